// The memory that a kernel may use, and the checks of every access to it.
//
// Two accesses to one element, at least one of them a write, are a race unless the same thread makes
// both or a barrier that names this kind of memory lies between them: a simdgroup's barrier for its
// own threads, a threadgroup's for all of its threads, nothing for threads of two threadgroups.
#pragma once
#include <sys/mman.h>

#include <deque>
#include <vector>

#include "report.h"

namespace metal_host {

// --- the order of accesses ------------------------------------------------------------------

enum Space { DEVICE, THREADGROUP, SPACES };
constexpr int flag_of(Space space) { return 1 << space; }  // metal::mem_flags

// Counts the barriers that order one kind of memory.
struct Clock {
  uint32_t start;  // the epoch in which this threadgroup began
  uint32_t epoch;  // rises at each of the threadgroup's barriers, through the whole launch
  uint16_t step[MAX_THREADS / SIMD_WIDTH];  // rises at each barrier of one simdgroup
};
Clock clocks[SPACES];

struct Access {
  uint32_t epoch;  // 0: no access yet
  uint16_t thread, step;
};

// What is remembered of one element: the last write, and as much of the reads as a later write can
// race with.
struct Cell {
  Access write, read;
  bool by_other_threadgroup;  // has been read by one, at any time
  bool by_simdgroups;         // has been read by several in the epoch of `read`
  bool by_lanes;              // has been read by several lanes of one in the step of `read`
};

struct Region {
  uintptr_t begin, end;
  Space space;
  bool writable, initialised;
  size_t item_bytes;
  char name[64];
  int line;  // of a threadgroup array's declaration
  int cell_shift;  // a cell covers 2^cell_shift bytes: an element, or 4 bytes of a larger one
  std::vector<Cell> cells;

  size_t index(uintptr_t address) const { return (address - begin) / item_bytes; }
  const char* what() const { return space == DEVICE ? "buffer" : "threadgroup array"; }
};
// A deque: regions keep their addresses when a threadgroup array is added.
std::deque<Region> regions;
Region* last_read = nullptr;
Region* last_written = nullptr;

// Free addresses on both sides of a buffer, so that no wrong 32-bit index reaches another one.
constexpr size_t GAP = size_t(1) << 34;
constexpr size_t pages(size_t bytes) { return (bytes + 4095) & ~size_t(4095); }

Region* add_region(const char* name, size_t bytes, size_t item_bytes, Space space, bool writable) {
  void* free = mmap(nullptr, pages(bytes) + 2 * GAP, PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (free == MAP_FAILED) return nullptr;
  char* begin = (char*)free + GAP;
  if (bytes && mprotect(begin, pages(bytes), PROT_READ | PROT_WRITE)) return nullptr;
  Region& region = regions.emplace_back();
  region.begin = (uintptr_t)begin, region.end = region.begin + bytes;
  region.space = space, region.writable = writable, region.item_bytes = item_bytes;
  snprintf(region.name, sizeof region.name, "%s", name);
  region.cell_shift = item_bytes % 4 == 0 ? 2 : item_bytes % 2 == 0 ? 1 : 0;
  if (writable) region.cells.resize((bytes >> region.cell_shift) + 1);
  return &region;
}

void remove_regions() {
  for (Region& region : regions)
    munmap((char*)region.begin - GAP, pages(region.end - region.begin) + 2 * GAP);
  regions.clear();
  last_read = last_written = nullptr;
}

// --- races and uninitialised reads ----------------------------------------------------------

bool same_simdgroup(const Access& access) { return access.thread / SIMD_WIDTH == self->simdgroup; }

// Whether nothing orders the earlier access before what the running thread does now.
bool unordered(const Access& earlier, const Clock& clock, Space space) {
  if (!earlier.epoch) return false;
  if (earlier.epoch < clock.start) return space == DEVICE;  // another threadgroup's
  if (earlier.epoch < clock.epoch || earlier.thread == self->thread) return false;
  return !same_simdgroup(earlier) || earlier.step == clock.step[self->simdgroup];
}

// The same for all earlier reads of a cell.
bool reads_unordered(const Cell& cell, const Clock& clock, Space space) {
  const Access& read = cell.read;
  if (cell.by_other_threadgroup || unordered(read, clock, space)) return true;
  if (read.epoch != clock.epoch) return false;
  return cell.by_simdgroups || (cell.by_lanes && read.step == clock.step[self->simdgroup]);
}

void remember_read(Cell& cell, const Access& now, const Clock& clock, Space space) {
  Access& read = cell.read;
  if (read.epoch != now.epoch) {
    cell.by_other_threadgroup |= space == DEVICE && read.epoch && read.epoch < clock.start;
    cell.by_simdgroups = cell.by_lanes = false;
    read = now;
  } else if (!same_simdgroup(read)) {
    cell.by_simdgroups = true;
  } else if (read.step != now.step) {
    cell.by_lanes = false;
    read = now;
  } else if (read.thread != now.thread) {
    cell.by_lanes = true;
  }
}

void report_race(const Region& region, uintptr_t address, const char* now, const char* before,
                 const Access& earlier, bool elsewhere, Where where) {
  char who[32] = "another thread";  // one of several
  if (earlier.thread != self->thread) snprintf(who, sizeof who, "thread %d", earlier.thread);
  const char* barrier = region.space == DEVICE ? "mem_device" : "mem_threadgroup";
  report("race", where, Then::go_on, "%s of %s '%s' element %zu, and an earlier %s by %s%s%s", now,
         region.what(), region.name, region.index(address), before,
         elsewhere ? "another threadgroup" : who,
         elsewhere ? "" : ", not ordered by a barrier with ", elsewhere ? "" : barrier);
}

void check_cell(Region& region, Cell& cell, uintptr_t address, bool write, Where where) {
  Space space = region.space;
  const Clock& clock = clocks[space];
  Access now = {clock.epoch, uint16_t(self->thread), clock.step[self->simdgroup]};
  const char* what = write ? "write" : "read";
  if (unordered(cell.write, clock, space)) {
    bool elsewhere = cell.write.epoch < clock.start;
    report_race(region, address, what, "write", cell.write, elsewhere, where);
  } else if (write && reads_unordered(cell, clock, space)) {
    bool elsewhere = cell.by_other_threadgroup || cell.read.epoch < clock.start;
    report_race(region, address, what, "read", cell.read, elsewhere, where);
  }
  if (write) {
    cell.write = now;
    return;
  }
  // Values that a threadgroup leaves in its arrays do not count as written for the next one.
  uint32_t since = space == DEVICE ? 1 : clock.start;
  if (!region.initialised && cell.write.epoch < since)
    report("uninitialised-read", where, Then::go_on, "%s '%s' element %zu was never written",
           region.what(), region.name, region.index(address));
  remember_read(cell, now, clock, space);
}

// --- every access ---------------------------------------------------------------------------

uint64_t accesses, max_accesses;

__attribute__((noinline)) Region* find_region(uintptr_t address) {
  for (Region& region : regions)
    if (address >= region.begin && address < region.end) return &region;
  return nullptr;
}

// Reports an access outside of all regions, in terms of the nearest one.
__attribute__((noinline)) void report_outside(uintptr_t address, size_t bytes, bool write,
                                              Where where) {
  const char* what = write ? "write" : "read";
  for (const Region& region : regions) {
    if (address + GAP < region.begin || address >= region.end + GAP) continue;
    auto item = intptr_t(region.item_bytes);
    auto distance = intptr_t(address - region.begin);
    report("out-of-bounds", where, Then::abort, "%zu-byte %s of %s '%s' at element %zd of %zu",
           bytes, what, region.what(), region.name,
           (distance - (distance < 0 ? item - 1 : 0)) / item, region.index(region.end));
    return;
  }
  report("out-of-bounds", where, Then::abort,
         "%zu-byte %s in no buffer, threadgroup array or variable of the thread", bytes, what);
}

void check_access(const void* pointer, size_t bytes, bool write, void* instruction) {
  auto address = (uintptr_t)pointer;
  if (!self || address - (uintptr_t)self->stack < STACK_BYTES) return;
  // The return address is after the call; the byte before it has the line of the call.
  Where where = {"", 0, (char*)instruction - 1};
  if (++accesses > max_accesses)
    report("runaway", where, Then::abort, "more than %zu accesses to memory", max_accesses);
  Region*& last = write ? last_written : last_read;
  Region* region = last;
  if (!region || address < region->begin || address >= region->end) {
    region = find_region(address);
    bool constant = pointer >= __ehdr_start && pointer < _end;
    if (!region && constant && !write) return;
    if (!region) return report_outside(address, bytes, write, where);
    last = region;
  }
  if (address + bytes > region->end) return report_outside(address, bytes, write, where);
  if (!region->writable) {
    if (write)
      report("write-to-input", where, Then::abort, "write to input '%s' element %zu", region->name,
             region->index(address));
    return;
  }
  size_t first = (address - region->begin) >> region->cell_shift;
  size_t end = ((address + bytes - 1 - region->begin) >> region->cell_shift) + 1;
  for (size_t i = first; i < end; i++)
    check_cell(*region, region->cells[i], region->begin + (i << region->cell_shift), write, where);
}

void check_all_written() {
  for (const Region& region : regions) {
    if (region.space != DEVICE || !region.writable || region.initialised) continue;
    size_t count = (region.end - region.begin) >> region.cell_shift, missing = 0, first = 0;
    for (size_t i = count; i-- > 0;)
      if (!region.cells[i].write.epoch) missing++, first = i;
    size_t cells_per_item = region.item_bytes >> region.cell_shift;
    if (missing)
      report("unwritten-output", NOWHERE, Then::go_on, "output '%s': %zu of %zu elements are never "
             "written, the first is element %zu", region.name, missing / cells_per_item,
             count / cells_per_item, first / cells_per_item);
  }
}

}  // namespace metal_host
