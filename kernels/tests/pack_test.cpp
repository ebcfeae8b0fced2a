// Tests of packing for every instruction set of the machine, against codes computed and stored one bit at a time. Built
// with AddressSanitizer by `make test-cpp`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "fenced_buffer.h"
#include "instruction_sets.h"
#include "random_source.h"

namespace torchrec_mpe {
namespace {

constexpr uint8_t kUntouched = 0xcd;

std::vector<uint8_t> pack_bit_by_bit(const std::vector<float>& rows, int64_t dim, int bits, float alpha,
                                     const std::vector<float>& beta) {
  const int64_t row_bytes = (dim + 7) / 8 * bits;
  const int64_t num_rows = static_cast<int64_t>(rows.size()) / dim;
  std::vector<uint8_t> packed(num_rows * row_bytes);
  const int half = 1 << (bits - 1);
  for (int64_t row = 0; row < num_rows; ++row) {
    // What pads a row to whole blocks is code 0.
    for (int64_t d = 0; d < dim; ++d) {
      const float value = rows[row * dim + d] - beta[d];
      const double rounded = std::nearbyint(static_cast<double>(value / alpha));
      const int code = static_cast<int>(std::min(std::max(rounded, -1.0 * half), half - 1.0)) + half;
      for (int bit = 0; bit < bits; ++bit) {
        const int64_t position = row * row_bytes * 8 + d / 8 * bits * 8 + d % 8 * bits + bit;
        packed[position / 8] |= static_cast<uint8_t>((code >> bit & 1) << (position % 8));
      }
    }
  }
  return packed;
}

int fail(const InstructionSet& set, int64_t dim, int bits, int64_t first, int64_t last, int64_t byte) {
  std::fprintf(stderr, "FAILED pack_rows, dim %d, %d bits, rows %d to %d, %s: byte %d differs\n", static_cast<int>(dim),
               bits, static_cast<int>(first), static_cast<int>(last), set.name, static_cast<int>(byte));
  return 1;
}

int run() {
  Random random(1);
  int packings = 0;
  for (const int64_t dim : {1, 5, 8, 9, 16, 24, 31, 64, 96, 100, 128, 256, 300}) {
    for (int bits = 1; bits <= 8; ++bits) {
      const int64_t num_rows = 11;
      const float alpha = 0.25f;
      std::vector<float> rows(num_rows * dim);
      std::vector<float> beta(dim);
      for (float& value : beta) {
        value = random.unit();
      }
      for (size_t i = 0; i < rows.size(); ++i) {
        // Values that clip, and ties; the infinite ones clip too.
        const float codes = std::ldexp(random.unit(), bits);
        rows[i] = i % 3 == 0 ? alpha * (std::floor(codes) + 0.5f) + beta[i % dim] : alpha * codes;
        rows[i] = random.below(50) == 0 ? std::copysign(INFINITY, codes) : rows[i];
      }
      const std::vector<uint8_t> expected = pack_bit_by_bit(rows, dim, bits, alpha, beta);
      const int64_t row_bytes = (dim + 7) / 8 * bits;
      const FencedBuffer<float> fenced_rows(rows);
      const FencedBuffer<float> fenced_beta(beta);
      for (const InstructionSet& set : instruction_sets()) {
        const int64_t ranges[][2] = {{0, num_rows}, {0, 1}, {3, 7}, {num_rows - 1, num_rows}, {4, 4}};
        for (const auto& [first, last] : ranges) {
          const FencedBuffer<uint8_t> packed(expected.size());
          std::fill_n(packed.data(), packed.size(), kUntouched);
          set.pack_rows({fenced_rows.data(), dim, bits, alpha, fenced_beta.data(), packed.data()}, first, last);
          for (int64_t byte = 0; byte < static_cast<int64_t>(expected.size()); ++byte) {
            const bool inside = byte >= first * row_bytes && byte < last * row_bytes;
            if (packed.data()[byte] != (inside ? expected[byte] : kUntouched)) {
              return fail(set, dim, bits, first, last, byte);
            }
          }
          ++packings;
        }
      }
    }
  }
  std::printf("pack_test: %d packings equal the expected bytes\n", packings);
  return 0;
}

}  // namespace
}  // namespace torchrec_mpe

int main() {
  return torchrec_mpe::run();
}
