// Any machine. It defines what the vector paths compute.
#include <algorithm>
#include <cstring>
#include <optional>
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
#include "packed_embedding_bag_coding.inc.h"

// One bag's sum, any dimension. G is not used.
template <int G>
class Accumulator {
 public:
  static constexpr int kLines = G == 0 ? 0 : 2;  // that a row spans; 0: any number
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

  // Adds [components] @ basis.
  void add_components(Sum&, const float* components, const PackedTable& table) {
    for (int c = 0; c < table.components; ++c) {
      for (int d = 0; d < dim_; ++d) {
        sum_[d] += components[c] * table.basis[static_cast<int64_t>(c) * dim_ + d];
      }
    }
  }

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

constexpr int kDecodedBytes = 20;  // from a transformed row's first byte to the last that is read, at most

// Adds up the components of transformed rows.
class Decoder {
 public:
  static constexpr bool kHasSpans = false;
  static constexpr bool kIsCheap = false;

  struct Sum {
    float components[kMaxComponents];
  };

  // Without runs there is no transformed row.
  Decoder(const CheckedRuns* runs, Span) : none_(runs == nullptr ? 0 : runs->none()) {
    for (int32_t k = 0; runs != nullptr && k <= none_; ++k) {
      Run run;
      const CheckedRun& checked = (*runs)[k];
      int bit = 0;
      int level = 0;
      for (int c = 0; c < kMaxComponents; ++c) {
        run.bit[c] = bit;
        bit += checked.widths[c];
        run.mask[c] = (1u << checked.widths[c]) - 1;
        if (checked.widths[c] > 0) {
          run.scale[c] = from_bfloat16(checked.levels[level++]);
          run.offset[c] = from_bfloat16(checked.levels[level++]);
        }
      }
      runs_.push_back(run);
    }
  }

  // What Ring::run is of rows that are not transformed.
  int32_t none() const {
    return none_;
  }

  template <Span>
  void add(Sum& sum, const uint8_t* weights, const Ring& ring, int slot) const {
    const Run& run = runs_[ring.run[slot]];
    for (int c = 0; c < kMaxComponents; ++c) {
      const int bit = ring.shift[slot] + run.bit[c];
      uint32_t word;
      std::memcpy(&word, weights + ring.start[slot] + bit / 8, 4);
      const float code = static_cast<float>(word >> (bit % 8) & run.mask[c]);
      sum.components[c] += ring.weight[slot] * (run.scale[c] * code + run.offset[c]);
    }
  }

  static void join(Sum& sum, const Sum& other) {
    for (int c = 0; c < kMaxComponents; ++c) {
      sum.components[c] += other.components[c];
    }
  }

  static void store(const Sum& sum, float* components) {
    std::copy_n(sum.components, kMaxComponents, components);
  }

 private:
  struct Run {
    int bit[kMaxComponents];
    uint32_t mask[kMaxComponents];
    float scale[kMaxComponents] = {};
    float offset[kMaxComponents] = {};
  };

  int32_t none_;
  std::vector<Run> runs_;
};

#include "packed_embedding_bag_steps.inc.h"
#include "packed_embedding_bag_plain_steps.inc.h"
#include "packed_embedding_bag_driver.inc.h"

void lookup_feature_by_dim(const Lookup& lookup, int64_t f, int64_t first, int64_t last, Faults& faults) {
  lookup_feature_of<0>(lookup, f, first, last, faults);
}

}  // namespace scalar
}  // namespace torchrec_mpe
