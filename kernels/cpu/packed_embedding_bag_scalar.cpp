// Any machine. It defines what the vector paths compute.
#include <algorithm>
#include <cstring>
#include <vector>

#include "packed_embedding_bag.h"

namespace torchrec_mpe {
namespace scalar {

#include "output.inc.h"

#include "packed_embedding_bag_ring.inc.h"

inline uint64_t low_bits(uint64_t word, int count) {
  return count <= 0 ? 0 : count >= 64 ? word : word & ((1ull << count) - 1);
}

#include "directory_lines.inc.h"

// One bag's sum, any dimension. G is not used.
template <int G>
class Accumulator {
 public:
  static constexpr bool kLongRows = G == 0;
  static constexpr bool kHasVariants = false;

  Accumulator(int dim, int blocks) : dim_(dim), blocks_(blocks), sum_(static_cast<size_t>(blocks) * 8) {}

  template <Rows kRows>
  struct Registers {};

  struct Sum {};

  void clear(Sum&) {
    std::fill(sum_.begin(), sum_.end(), 0.0f);
  }

  // Adds scale * code for every element of a row; reads up to 7 bytes beyond it.
  template <Rows kRows>
  void add(Sum&, const Registers<kRows>&, const uint8_t* weights, const Ring& ring, int slot) {
    const uint8_t* row = weights + ring.start[slot];
    const int bits = ring.bits[slot];
    const float scale = ring.scale[slot];
    const int32_t mask = (1 << bits) - 1;
    const int32_t half = (1 << bits) >> 1;
    for (int block = 0; block < blocks_; ++block) {
      uint64_t word;
      std::memcpy(&word, row + block * bits, 8);
      for (int j = 0; j < 8; ++j) {
        const int32_t code = static_cast<int32_t>(word >> (j * bits) & mask) - half;
        sum_[block * 8 + j] += scale * static_cast<float>(code);
      }
    }
  }

  template <Rows kRows>
  void unbias(Sum&, float) {}

  void finish(const Sum&, const PackedTable& table, float kept, float zero, float factor, void* output, OutputType type,
              int64_t position) const {
    for (int d = 0; d < dim_; ++d) {
      float value = sum_[d] + kept * table.beta[d];
      value += table.zero_row == nullptr ? 0.0f : zero * table.zero_row[d];
      store_element(output, type, position + d, value * factor);
    }
  }

 private:
  int dim_;
  int blocks_;
  std::vector<float> sum_;
};


#include "packed_embedding_bag_steps.inc.h"
#include "packed_embedding_bag_plain_steps.inc.h"
#include "packed_embedding_bag_driver.inc.h"

void lookup_feature_by_dim(const Lookup& lookup, int64_t f, int64_t first, int64_t last, Faults& faults) {
  lookup_feature_of<0>(lookup, f, first, last, faults);
}

}  // namespace scalar
}  // namespace torchrec_mpe
