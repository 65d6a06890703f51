// Arrays that the threads of a threadgroup share, and functions that are not checked.
#pragma once
#include <type_traits>

#include "host.h"

// For functions that exchange values between lanes: they read memory of the runtime, unchecked.
#define MSL_UNCHECKED __attribute__((noinline, no_sanitize("thread"), no_sanitize("undefined")))

template <class T>
T& msl_threadgroup(const char* name, int line = __builtin_LINE()) {
  using Item = std::remove_all_extents_t<T>;
  return *static_cast<T*>(metal_host::threadgroup_array(name, sizeof(T), sizeof(Item), line));
}
