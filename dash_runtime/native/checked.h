// What the checked build (-DDASH_CHECKED) looks after; all of it is nothing elsewhere.
#pragma once
#include <cstddef>

#ifdef DASH_CHECKED
#include <cstdio>
#include <cstdlib>

// Ends the process if the condition does not hold: of indices, and of what else would be another's memory.
#define DASH_CHECK(condition) \
  ((condition) ? void() : (std::fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition), std::abort()))
#else
#define DASH_CHECK(condition) void()
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

// Tells the address sanitizer of memory between others' that nobody may use, and of memory that somebody may again.
inline void forbid([[maybe_unused]] void *memory, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(memory, size);
#endif
}

inline void allow([[maybe_unused]] void *memory, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(memory, size);
#endif
}
