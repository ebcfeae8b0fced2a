// Integer tensors of several types.
#pragma once

#include <ATen/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>

namespace torchrec_mpe {
namespace quantization {

using at::Tensor;

// A tensor of uint8, int8, int16, int32 or int64, read at random.
class Integers {
 public:
  explicit Integers(const Tensor& t) : tensor_(t.contiguous()), data_(tensor_.const_data_ptr()), type_(t.scalar_type()) {
    const bool is_read = type_ == at::kByte || type_ == at::kChar || type_ == at::kShort || type_ == at::kInt ||
                         type_ == at::kLong;
    TORCH_CHECK_TYPE(is_read, "expected an integer tensor (uint8, int8, int16, int32 or int64), not ", type_);
  }
  int64_t operator[](int64_t i) const {
    switch (type_) {
      case at::kByte:
        return static_cast<const uint8_t*>(data_)[i];
      case at::kShort:
        return static_cast<const int16_t*>(data_)[i];
      case at::kInt:
        return static_cast<const int32_t*>(data_)[i];
      case at::kLong:
        return static_cast<const int64_t*>(data_)[i];
      default:
        return static_cast<const int8_t*>(data_)[i];
    }
  }
  // to[i] = (*this)[index(i)] for n of them; each must lie in [0, limit).
  template <typename Index>
  void read(int64_t n, const Index& index, int64_t limit, int32_t* to) const {
    switch (type_) {
      case at::kByte:
        return read_as<uint8_t>(n, index, limit, to);
      case at::kShort:
        return read_as<int16_t>(n, index, limit, to);
      case at::kInt:
        return read_as<int32_t>(n, index, limit, to);
      case at::kLong:
        return read_as<int64_t>(n, index, limit, to);
      default:
        return read_as<int8_t>(n, index, limit, to);
    }
  }

 private:
  template <typename I, typename Index>
  void read_as(int64_t n, const Index& index, int64_t limit, int32_t* to) const {
    const I* from = static_cast<const I*>(data_);
    uint64_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const auto value = static_cast<uint64_t>(static_cast<int64_t>(from[index(i)]));
      largest = std::max(largest, value);
      to[i] = static_cast<int32_t>(value);
    }
    TORCH_CHECK_INDEX(largest < static_cast<uint64_t>(limit), "group, candidate or table number ",
                      static_cast<int64_t>(largest), " is not in 0 to ", limit - 1);
  }

  Tensor tensor_;
  const void* data_;
  at::ScalarType type_;
};

// The bag after those of feature f, which begin with `first`.
inline int64_t bag_after(int64_t f, int64_t first, int64_t bags) {
  TORCH_CHECK_VALUE(bags >= 0 && bags <= INT64_MAX - first, "feature ", f, " has ", bags, " bags");
  return first + bags;
}

}  // namespace quantization
}  // namespace torchrec_mpe
