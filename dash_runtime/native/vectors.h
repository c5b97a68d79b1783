// Vectors of 16 float32 lanes, which the compiler maps to what the processor has, and a few functions of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "checked.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int kLanes = 16;
constexpr int kLineBytes = 64;  // of the cache
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
constexpr Ints kNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The floats of one register. Loops carry vectors of this width from turn to turn: wider ones would lie in memory.
#ifdef __AVX512F__
constexpr int kRegisterLanes = 16;
#else
constexpr int kRegisterLanes = 8;
#endif
using Register = float __attribute__((vector_size(4 * kRegisterLanes)));
using Words = int32_t __attribute__((vector_size(4 * kRegisterLanes)));
#ifdef __AVX512F__
constexpr Words kLaneNumbers = kNumbers;
#else
constexpr Words kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

template <class Vector>
inline Vector load(const void *from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class Vector>
inline void store(void *to, Vector value) {
  std::memcpy(to, &value, sizeof value);
}

inline Floats filled(float value) { return value - Floats{}; }

// Reads 16 half words, and 16 bytes. Compilers take the latter one by one if they are not told how.
inline Ints from_halves(const void *from) {
#ifdef __AVX512F__
  return (Ints)_mm512_cvtepu16_epi32((__m256i)load<Halves>(from));
#else
  return __builtin_convertvector(load<Halves>(from), Ints);
#endif
}

inline Ints from_bytes(const uint8_t *from) {
#ifdef __AVX512F__
  return (Ints)_mm512_cvtepu8_epi32(load<__m128i>(from));
#else
  using Bytes = uint8_t __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Halves), Ints);
#endif
}

// Reads 16 bf16 numbers.
inline Floats from_bf16(const uint16_t *from) { return (Floats)(from_halves(from) << 16); }

inline Register register_from_bf16(const uint16_t *from) {
#ifdef __AVX512F__
  return from_bf16(from);
#else
  using Narrow = uint16_t __attribute__((vector_size(2 * kRegisterLanes)));
  return (Register)(__builtin_convertvector(load<Narrow>(from), Words) << 16);
#endif
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Rounds to the nearest bf16 numbers, which the high halves of the lanes then are.
inline Ints to_bf16_bits(Floats value) {
  const Ints bits = (Ints)value;
  const Ints rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return value == value ? rounded : bits;
}

inline Floats rounded_to_bf16(Floats value) { return (Floats)(to_bf16_bits(value) & ~0xFFFF); }

inline void write_bf16(uint16_t *to, Floats value) {
  store(to, __builtin_convertvector(to_bf16_bits(value) >> 16, Halves));
}

// Combines the lanes by halves.
template <class Combine>
inline float folded(Floats value, Combine combine) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] = combine(lanes[lane], lanes[lane + width]);
  return lanes[0];
}

inline float largest(Floats value) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)value);
#else
  return folded(value, [](float one, float other) { return other > one ? other : one; });
#endif
}

inline float sum(Floats value) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)value);
#else
  return folded(value, [](float one, float other) { return one + other; });
#endif
}

#ifdef __AVX512F__
// What was no number may wrap around here, which `_mm512_reduce_add_epi32` leaves undefined.
inline int32_t sum(__m512i value) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(value), _mm512_extracti64x4_epi64(value, 1));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}
#endif

// The lanes that are at least `least`, one bit each.
inline uint32_t lanes_above(Floats value, float least) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)value, _mm512_set1_ps(least), _CMP_GE_OQ);
#else
  float lanes[kLanes];
  store(lanes, value);
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(lanes[lane] >= least) << lane;
  return bits;
#endif
}

inline Floats larger(Floats one, Floats other) { return one > other ? one : other; }

// e^x with an error of two units in the last place. Below -87 it is 0.
inline Floats exponential(Floats x) {
  const Floats bounded = x > 88.0f ? filled(88.0f) : larger(x, filled(-87.0f));
  const Floats magic = filled(12582912.0f);  // adding it rounds to whole numbers
  const Floats shifted = bounded * 1.44269504f + magic;
  const Floats power = shifted - magic;
  const Floats rest = bounded - power * 0.693359375f + power * 2.12194440e-4f;
  Floats value = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  value = value * rest + 8.3334519073e-3f;
  value = value * rest + 4.1665795894e-2f;
  value = value * rest + 1.6666665459e-1f;
  value = value * rest + 5.0000001201e-1f;
  value = value * rest * rest + rest + 1.0f;
  const Ints exponent = ((Ints)shifted - (Ints)magic + 127) << 23;
  return x < -87.0f ? Floats{} : value * (Floats)exponent;
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

inline float dot(const float *one, const float *other, int64_t count) {
  Register sums[kLanes / kRegisterLanes]{};
  for (int64_t place = 0; place < count; place += kLanes)
    for (int part = 0; part < kLanes / kRegisterLanes; ++part) {
      const int64_t from = place + part * kRegisterLanes;
      sums[part] += load<Register>(one + from) * load<Register>(other + from);
    }
  return sum(load<Floats>(sums));
}
