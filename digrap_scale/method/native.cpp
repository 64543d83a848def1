// The passes over memory that a step costs, on the CPU, for many layers in one call: what kernels.py does in tensor
// operations, with every operand read once. C interface, no headers of torch; built by native.py.
//
// A table has a row a layer; an operand is two columns, its address and its kind. Work comes in blocks (row, start, stop),
// fixed by the layers' sizes alone, so that sums do not depend on the number of threads. float32 within a chunk, float64
// above it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

enum Kind : int64_t { ABSENT = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

constexpr int64_t CHUNK = 4096;  // elements: a chunk's operands, widened to float32, stay in the first-level cache
constexpr int LANES = 16;        // independent float32 sums: one or two vector registers
const float ZEROS[CHUNK] = {};

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float from_bfloat16(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }

float from_float16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  // Exponents are rebased by a multiplication, which also makes subnormal numbers right; infinity and NaN keep theirs.
  const float finite = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);  // · 2^112
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bits_to_float(float_to_bits(finite) | special | sign);
}

uint16_t to_bfloat16(float value) {  // to the nearest, ties to even, as torch rounds
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

uint16_t to_float16(float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 65536 and more: infinity
  if (magnitude < 0x38800000u) {                        // subnormal: the addition of 0.5 rounds at the right bit
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000u);
  }
  const uint32_t rebased = magnitude - 0x38000000u;
  return sign | static_cast<uint16_t>((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13);
}

// [start, start + n) of an operand as float32: where it lies, or widened into `buffer`.
const float* load(const int64_t* operand, int64_t start, int64_t n, float* buffer) {
  switch (operand[1]) {
    case FLOAT32:
      return reinterpret_cast<const float*>(operand[0]) + start;
    case BFLOAT16: {
      const uint16_t* source = reinterpret_cast<const uint16_t*>(operand[0]) + start;
      for (int64_t i = 0; i < n; i++) buffer[i] = from_bfloat16(source[i]);
      return buffer;
    }
    case FLOAT16: {
      const uint16_t* source = reinterpret_cast<const uint16_t*>(operand[0]) + start;
      for (int64_t i = 0; i < n; i++) buffer[i] = from_float16(source[i]);
      return buffer;
    }
    default:
      return ZEROS;
  }
}

void store(const int64_t* operand, int64_t start, int64_t n, const float* values) {
  if (operand[1] == FLOAT32) return;  // was changed in place
  uint16_t* target = reinterpret_cast<uint16_t*>(operand[0]) + start;
  for (int64_t i = 0; i < n; i++) target[i] = operand[1] == BFLOAT16 ? to_bfloat16(values[i]) : to_float16(values[i]);
}

enum Before { NONE, STORED, MOMENTS };

// ⟨g, d⟩, ‖d‖², ⟨g, d_before⟩, ‖g‖² of n elements. `before` holds the previous weights, or Adam's first moment.
template <Before BEFORE>
void products(const float* g, const float* w, const float* r, const float* before, const float* second,
              const float* numbers, int64_t n, double* sums) {
  float s0[LANES] = {}, s1[LANES] = {}, s2[LANES] = {}, s3[LANES] = {};
  const float shrink = numbers[0], step = numbers[1], scale = numbers[2], eps = numbers[3];
  const auto previous = [&](int64_t i) {
    if (BEFORE == STORED) return before[i];
    // In the order of torch's own step, with its roundings: a huge update (second moments of 0) must come out as it went in.
    return (w[i] + (step * before[i]) / (std::sqrt(second[i]) * scale + eps)) / shrink;
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int k = 0; k < LANES; k++) {
      const float gradient = g[i + k], d = w[i + k] - r[i + k];
      s0[k] += gradient * d;
      s1[k] += d * d;
      s3[k] += gradient * gradient;
      if (BEFORE != NONE) s2[k] += gradient * (previous(i + k) - r[i + k]);
    }
  }
  for (int k = 0; i < n; i++, k++) {
    const float gradient = g[i], d = w[i] - r[i];
    s0[k] += gradient * d;
    s1[k] += d * d;
    s3[k] += gradient * gradient;
    if (BEFORE != NONE) s2[k] += gradient * (previous(i) - r[i]);
  }
  for (int k = 0; k < LANES; k++) {
    sums[0] += s0[k];
    sums[1] += s1[k];
    sums[2] += s2[k];
    sums[3] += s3[k];
  }
}

template <class Body>
void for_chunks(const int64_t* blocks, int64_t first, int64_t last, Body body) {
  for (int64_t block = first; block < last; block++) {
    const int64_t row = blocks[3 * block], stop = blocks[3 * block + 2];
    for (int64_t start = blocks[3 * block + 1]; start < stop; start += CHUNK) {
      body(block, row, start, std::min(CHUNK, stop - start));
    }
  }
}

}  // namespace

extern "C" {

// table: grad, weight, reference, previous, first moment, second moment. numbers: shrink, step_size,
// second_scale, eps (of the moments). sums: [blocks, 4], zeroed.
void gradient_products(const int64_t* table, const float* numbers, const int64_t* blocks, int64_t first, int64_t last,
                       double* sums) {
  float buffers[4][CHUNK];
  for_chunks(blocks, first, last, [&](int64_t block, int64_t row, int64_t start, int64_t n) {
    const int64_t* of_row = table + 12 * row;
    const float* g = load(of_row, start, n, buffers[0]);
    const float* w = load(of_row + 2, start, n, buffers[1]);
    const float* r = load(of_row + 4, start, n, buffers[2]);
    double* out = sums + 4 * block;
    const float* f = numbers + 4 * row;
    if (of_row[9] != ABSENT) {
      const float* m = load(of_row + 8, start, n, nullptr);
      const float* v = load(of_row + 10, start, n, nullptr);
      products<MOMENTS>(g, w, r, m, v, f, n, out);
    } else if (of_row[7] != ABSENT) {
      products<STORED>(g, w, r, load(of_row + 6, start, n, buffers[3]), nullptr, f, n, out);
    } else {
      products<NONE>(g, w, r, nullptr, nullptr, f, n, out);
    }
  });
}

// table: new weight, previous weight, reference. ⟨u, d⟩ and ‖u‖², u = new − previous, d = previous − reference.
// sums: [blocks, 2], zeroed.
void update_products(const int64_t* table, const float*, const int64_t* blocks, int64_t first, int64_t last,
                     double* sums) {
  float buffers[3][CHUNK], u[CHUNK];
  for_chunks(blocks, first, last, [&](int64_t block, int64_t row, int64_t start, int64_t n) {
    const int64_t* of_row = table + 6 * row;
    const float* now = load(of_row, start, n, buffers[0]);
    const float* before = load(of_row + 2, start, n, buffers[1]);
    const float* r = load(of_row + 4, start, n, buffers[2]);
    for (int64_t i = 0; i < n; i++) u[i] = now[i] - before[i];
    double four[4] = {};
    products<NONE>(u, before, r, nullptr, nullptr, ZEROS, n, four);
    sums[2 * block] += four[0];
    sums[2 * block + 1] += four[3];
  });
}

// table: target, θ, reference. numbers: factor, scale. target ← scale · target + factor · (θ − reference).
void add_displacement(const int64_t* table, const float* numbers, const int64_t* blocks, int64_t first, int64_t last,
                      double*) {
  float buffers[3][CHUNK];
  for_chunks(blocks, first, last, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    const int64_t* of_row = table + 6 * row;
    float* x = const_cast<float*>(load(of_row, start, n, buffers[0]));
    const float* theta = load(of_row + 2, start, n, buffers[1]);
    const float* r = load(of_row + 4, start, n, buffers[2]);
    const float factor = numbers[2 * row], scale = numbers[2 * row + 1];
    for (int64_t i = 0; i < n; i++) x[i] = scale * x[i] + factor * (theta[i] - r[i]);
    store(of_row, start, n, x);
  });
}

// table: weight, first moment, second moment (all float32), grad, reference. numbers: AdamNumbers.
void adam(const int64_t* table, const float* numbers, const int64_t* blocks, int64_t first, int64_t last, double*) {
  float buffers[2][CHUNK];
  for_chunks(blocks, first, last, [&](int64_t, int64_t row, int64_t start, int64_t n) {
    const int64_t* of_row = table + 10 * row;
    float* w = const_cast<float*>(load(of_row, start, n, nullptr));
    float* m = const_cast<float*>(load(of_row + 2, start, n, nullptr));
    float* v = const_cast<float*>(load(of_row + 4, start, n, nullptr));
    const float* grad = load(of_row + 6, start, n, buffers[0]);
    const float* r = load(of_row + 8, start, n, buffers[1]);
    const float* f = numbers + 11 * row;
    const float scale = f[0], factor = f[1], coupled = f[2], beta1 = f[3], keep1 = f[4], beta2 = f[5], keep2 = f[6],
                step_size = f[7], second_scale = f[8], eps = f[9], decay = f[10];
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {
      const float g = scale * grad[i] + factor * (w[i] - r[i]) + coupled * w[i];
      m[i] = beta1 * m[i] + keep1 * g;
      v[i] = beta2 * v[i] + keep2 * g * g;
      // θ − lr·λ·θ, not (1 − lr·λ)·θ: in float32 a small lr·λ would drown in the 1.
      w[i] -= decay * w[i] + (step_size * m[i]) / (std::sqrt(v[i]) * second_scale + eps);
    }
  });
}

}  // extern "C"
