// Preloaded into a process, counts what it does to files below one folder, and at one of these
// operations kills it or tells it that the disk is full. __init__.py compiles and uses it.
//
// Seen: everything that changes the file system through libc's functions, which is how Python, C++
// streams and MLX write. Not seen: buffered writes of C's own FILE functions, and memory maps.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

typedef enum { PROCEED, FAIL, TEAR, TEAR_AND_DIE } Verdict;
// When a full disk rejects an operation: never; perhaps, if a folder has to grow for it; always.
typedef enum { FREES, MAY_ALLOCATE, ALLOCATES } Need;

static char folder[PATH_MAX];
static size_t folder_length;
static pid_t process;  // of which operations count: neither forked nor started ones
static long kill_at, full_at, full_until;
static int torn, error, trace = -1;
static atomic_long count;

void faults_arm(const char* path, const char* trace_path, long kill, long full, long until,
                long tear, long code) {
  snprintf(folder, sizeof folder, "%s", path);
  folder_length = strlen(folder);
  process = getpid();
  kill_at = kill, full_at = full, full_until = until ? until : LONG_MAX;
  torn = tear != 0, error = (int)code;
  count = 0;
  trace = (int)syscall(SYS_openat, AT_FDCWD, trace_path,
                       O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static long number(const char* name) {
  const char* text = getenv(name);
  return text ? atol(text) : 0;
}

__attribute__((constructor)) static void arm_by_environment(void) {
  if (!getenv("FAULTS_FOLDER")) return;
  faults_arm(getenv("FAULTS_FOLDER"), getenv("FAULTS_TRACE"), number("FAULTS_KILL_AT"),
             number("FAULTS_FULL_AT"), number("FAULTS_FULL_UNTIL"), number("FAULTS_TORN"),
             number("FAULTS_ERROR"));
  unsetenv("FAULTS_FOLDER");  // what this process starts is not watched
}

static int is_below(const char* path) {
  return process == getpid() && !strncmp(path, folder, folder_length) &&
         (path[folder_length] == '/' || !path[folder_length]);
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

static Verdict decide(const char* name, const char* path, unsigned long inode, Need need,
                      int is_write) {
  if (!is_below(path)) return PROCEED;
  long n = ++count;
  char line[PATH_MAX + 64];
  int length = snprintf(line, sizeof line, "%s\t%lu\t%s\n", name, inode,
                        path[folder_length] ? path + folder_length + 1 : ".");
  if (trace >= 0) syscall(SYS_write, trace, line, (size_t)length);
  if (n == kill_at) {
    if (torn && is_write) return TEAR_AND_DIE;
    die();
  }
  if (!full_at || n < full_at || n >= full_until || need == FREES) return PROCEED;
  if (n > full_at) return need == ALLOCATES ? FAIL : PROCEED;
  return torn && is_write ? TEAR : FAIL;
}

// The path without links, but for its last part, which the operation may be about to create.
static void absolute(int directory, const char* path, char* result) {
  char full[PATH_MAX] = "", link[64];
  if (path[0] != '/') {
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    const char* name = directory == AT_FDCWD ? "/proc/self/cwd" : link;
    ssize_t length = readlink(name, full, sizeof full - 1);
    full[length < 0 ? 0 : length] = 0;
  }
  size_t start = strlen(full);
  snprintf(full + start, sizeof full - start, "%s%s", start ? "/" : "", path);
  for (size_t end = strlen(full); end > 1 && full[end - 1] == '/';) full[--end] = 0;
  char* last = strrchr(full, '/');
  char parent[PATH_MAX];
  if (last) *last = 0;
  if (!last || !realpath(last == full ? "/" : full, parent)) {
    if (last) *last = '/';
    snprintf(result, PATH_MAX, "%s", full);
  } else {
    size_t length = strlen(parent);
    snprintf(result, PATH_MAX, "%s", parent);
    snprintf(result + length, PATH_MAX - length, "/%s", last + 1);
  }
}

static Verdict decide_path(const char* name, int directory, const char* path, Need need) {
  if (process != getpid()) return PROCEED;
  char full[PATH_MAX];
  absolute(directory, path, full);
  return decide(name, full, 0, need, 0);
}

static Verdict decide_file(const char* name, int file, int is_write) {
  if (process != getpid()) return PROCEED;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return PROCEED;
  path[length] = 0;
  struct stat state;
  unsigned long inode = fstat(file, &state) ? 0 : state.st_ino;
  return decide(name, path, inode, is_write ? ALLOCATES : MAY_ALLOCATE, is_write);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OR_FAIL(verdict)    \
  if ((verdict) == FAIL) {  \
    errno = error;          \
    return -1;              \
  }

// --- opening -----------------------------------------------------------------------------------

#define IS_FOR_WRITING(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

static Verdict decide_open(int directory, const char* path, int flags) {
  if (!IS_FOR_WRITING(flags)) return PROCEED;
  int creates = (flags & O_CREAT) && faccessat(directory, path, F_OK, AT_SYMLINK_NOFOLLOW);
  return decide_path("open", directory, path, creates ? ALLOCATES : FREES);
}

#define MODE                               \
  mode_t mode = 0;                         \
  if (flags & (O_CREAT | O_TMPFILE)) {     \
    va_list list;                          \
    va_start(list, flags);                 \
    mode = va_arg(list, mode_t);           \
    va_end(list);                          \
  }
#define OPEN(name)                                        \
  int name(const char* path, int flags, ...) {            \
    MODE OR_FAIL(decide_open(AT_FDCWD, path, flags))      \
    return REAL(name)(path, flags, mode);                 \
  }
#define OPENAT(name)                                            \
  int name(int directory, const char* path, int flags, ...) {   \
    MODE OR_FAIL(decide_open(directory, path, flags))           \
    return REAL(name)(directory, path, flags, mode);            \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                          \
  FILE* name(const char* path, const char* mode) {                                           \
    int flags = strpbrk(mode, "wa") ? O_WRONLY | O_CREAT : strchr(mode, '+') ? O_RDWR : 0;   \
    if (decide_open(AT_FDCWD, path, flags) == FAIL) {                                        \
      errno = error;                                                                         \
      return NULL;                                                                           \
    }                                                                                        \
    return REAL(name)(path, mode);                                                           \
  }
FOPEN(fopen)
FOPEN(fopen64)

// --- writing -----------------------------------------------------------------------------------

// A torn write does part of the work, as on a disk that fills up in the middle of it.
#define WRITE(name, whole, part)                        \
  Verdict verdict = decide_file(name, file, 1);         \
  OR_FAIL(verdict)                                      \
  if (verdict == PROCEED) return whole;                 \
  ssize_t done = part;                                   \
  if (verdict == TEAR_AND_DIE) die();                   \
  return done;

ssize_t write(int file, const void* data, size_t size) {
  WRITE("write", REAL(write)(file, data, size), REAL(write)(file, data, size / 2))
}
ssize_t pwrite(int file, const void* data, size_t size, off_t at) {
  WRITE("write", REAL(pwrite)(file, data, size, at), REAL(pwrite)(file, data, size / 2, at))
}
ssize_t pwrite64(int file, const void* data, size_t size, off64_t at) {
  WRITE("write", REAL(pwrite64)(file, data, size, at), REAL(pwrite64)(file, data, size / 2, at))
}
ssize_t writev(int file, const struct iovec* parts, int number_of_parts) {
  WRITE("write", REAL(writev)(file, parts, number_of_parts),
        REAL(write)(file, parts[0].iov_base, parts[0].iov_len / 2))
}
ssize_t sendfile(int file, int source, off_t* at, size_t size) {
  WRITE("write", REAL(sendfile)(file, source, at, size), REAL(sendfile)(file, source, at, 1))
}
ssize_t sendfile64(int file, int source, off64_t* at, size_t size) {
  WRITE("write", REAL(sendfile64)(file, source, at, size),
        REAL(sendfile64)(file, source, at, 1))
}
ssize_t copy_file_range(int source, off64_t* from, int file, off64_t* to, size_t size,
                        unsigned flags) {
  WRITE("write", REAL(copy_file_range)(source, from, file, to, size, flags),
        REAL(copy_file_range)(source, from, file, to, 1, flags))
}
int ftruncate(int file, off_t size) {
  OR_FAIL(decide_file("truncate", file, 0))
  return REAL(ftruncate)(file, size);
}
int ftruncate64(int file, off64_t size) {
  OR_FAIL(decide_file("truncate", file, 0))
  return REAL(ftruncate64)(file, size);
}

// Not executed: what a killed process has written is there without it, and tests are faster.
int fsync(int file) {
  OR_FAIL(decide_file("sync", file, 0))
  return process == getpid() ? 0 : REAL(fsync)(file);
}
int fdatasync(int file) {
  OR_FAIL(decide_file("sync", file, 0))
  return process == getpid() ? 0 : REAL(fdatasync)(file);
}

// --- names -------------------------------------------------------------------------------------

#define PATH1(result, name, label, need, parameters, directory, path, arguments) \
  result name parameters {                                                       \
    OR_FAIL(decide_path(label, directory, path, need))                           \
    return REAL(name) arguments;                                                 \
  }
PATH1(int, mkdir, "mkdir", ALLOCATES, (const char* p, mode_t m), AT_FDCWD, p, (p, m))
PATH1(int, mkdirat, "mkdir", ALLOCATES, (int d, const char* p, mode_t m), d, p, (d, p, m))
PATH1(int, unlink, "unlink", FREES, (const char* p), AT_FDCWD, p, (p))
PATH1(int, rmdir, "rmdir", FREES, (const char* p), AT_FDCWD, p, (p))
PATH1(int, unlinkat, "unlink", FREES, (int d, const char* p, int f), d, p, (d, p, f))
PATH1(int, rename, "rename", MAY_ALLOCATE, (const char* p, const char* q), AT_FDCWD, q, (p, q))
PATH1(int, renameat, "rename", MAY_ALLOCATE, (int c, const char* p, int d, const char* q), d, q,
      (c, p, d, q))
PATH1(int, link, "link", ALLOCATES, (const char* p, const char* q), AT_FDCWD, q, (p, q))
PATH1(int, linkat, "link", ALLOCATES, (int c, const char* p, int d, const char* q, int f), d, q,
      (c, p, d, q, f))
PATH1(int, symlink, "link", ALLOCATES, (const char* p, const char* q), AT_FDCWD, q, (p, q))
