// A lookup whose ids, offsets, weights and output lie in memory of exactly their size.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fenced_buffer.h"
#include "packed_embedding_bag.h"

namespace torchrec_mpe {

struct LookupInputs {
  std::vector<Feature> features;
  int64_t batch = 0;
  std::vector<int64_t> ids;
  std::vector<int64_t> offsets;
  std::vector<float> weights;  // empty: none
  bool weighted = false;
  bool indices_64 = true;
  bool offsets_64 = true;
  OutputType output_type = OutputType::Float;
  int64_t output_stride = 0;
};

inline size_t element_bytes(OutputType type) {
  return type == OutputType::Float ? 4 : 2;
}

// What a lookup wrote, over bytes of kUntouched, and met.
struct LookupResult {
  static constexpr uint8_t kUntouched = 0xcd;

  OutputType type;
  std::vector<uint8_t> bytes;
  std::vector<Faults> faults;  // one for each range of bags

  double at(int64_t position) const {
    if (type == OutputType::Float) {
      float value;
      std::memcpy(&value, bytes.data() + 4 * position, 4);
      return value;
    }
    uint16_t word;
    std::memcpy(&word, bytes.data() + 2 * position, 2);
    return decode(type, word);
  }

  bool untouched(int64_t position) const {
    const size_t size = element_bytes(type);
    for (size_t i = 0; i < size; ++i) {
      if (bytes[position * size + i] != kUntouched) {
        return false;
      }
    }
    return true;
  }

  static double decode(OutputType type, uint16_t word) {
    const int exponent_bits = type == OutputType::Half ? 5 : 8;
    const int mantissa_bits = 15 - exponent_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = word >> mantissa_bits & ((1 << exponent_bits) - 1);
    const int mantissa = word & ((1 << mantissa_bits) - 1);
    const double sign = word >> 15 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) {
      return mantissa ? std::nan("") : sign * INFINITY;
    }
    return exponent == 0 ? sign * std::ldexp(mantissa, 1 - bias - mantissa_bits)
                         : sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
};

class FencedLookup {
 public:
  explicit FencedLookup(const LookupInputs& inputs)
      : features_(inputs.features), ids_64_(inputs.indices_64 ? inputs.ids : std::vector<int64_t>()),
        ids_32_(inputs.indices_64 ? std::vector<int32_t>() : narrow(inputs.ids)),
        offsets_64_(inputs.offsets_64 ? inputs.offsets : std::vector<int64_t>()),
        offsets_32_(inputs.offsets_64 ? std::vector<int32_t>() : narrow(inputs.offsets)), weights_(inputs.weights) {
    lookup_.features = features_.data();
    lookup_.num_features = static_cast<int64_t>(features_.size());
    lookup_.batch = inputs.batch;
    lookup_.indices = inputs.indices_64 ? static_cast<const void*>(ids_64_.data()) : ids_32_.data();
    lookup_.indices_64 = inputs.indices_64;
    lookup_.num_indices = static_cast<int64_t>(inputs.ids.size());
    lookup_.offsets = inputs.offsets_64 ? static_cast<const void*>(offsets_64_.data()) : offsets_32_.data();
    lookup_.offsets_64 = inputs.offsets_64;
    lookup_.weights = inputs.weighted ? weights_.data() : nullptr;
    lookup_.output_type = inputs.output_type;
    lookup_.output_stride = inputs.output_stride;
  }

  // Pools bags [bounds[k], bounds[k + 1]) for every k, a call each.
  LookupResult run(LookupBags lookup_bags, const std::vector<int64_t>& bounds) {
    const size_t elements = static_cast<size_t>(lookup_.batch * lookup_.output_stride);
    const size_t bytes = elements * element_bytes(lookup_.output_type);
    FencedBuffer<uint8_t> output(bytes);
    std::memset(output.data(), LookupResult::kUntouched, bytes);
    lookup_.output = output.data();
    LookupResult result{lookup_.output_type, {}, std::vector<Faults>(bounds.size() - 1)};
    for (size_t k = 0; k + 1 < bounds.size(); ++k) {
      lookup_bags(lookup_, bounds[k], bounds[k + 1], result.faults[k]);
    }
    result.bytes.assign(output.data(), output.data() + bytes);
    return result;
  }

 private:
  static std::vector<int32_t> narrow(const std::vector<int64_t>& values) {
    return std::vector<int32_t>(values.begin(), values.end());
  }

  std::vector<Feature> features_;
  FencedBuffer<int64_t> ids_64_;
  FencedBuffer<int32_t> ids_32_;
  FencedBuffer<int64_t> offsets_64_;
  FencedBuffer<int32_t> offsets_32_;
  FencedBuffer<float> weights_;
  Lookup lookup_{};
};

}  // namespace torchrec_mpe
