// Random numbers that are the same on every machine (SplitMix64).
#pragma once

#include <cstdint>

namespace torchrec_mpe {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t word = state_ += 0x9e3779b97f4a7c15ull;
    word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ word >> 27) * 0x94d049bb133111ebull;
    return word ^ word >> 31;
  }

  // An integer in [0, bound).
  int64_t below(int64_t bound) {
    return static_cast<int64_t>(next() % static_cast<uint64_t>(bound));
  }

  // A float in [-1, 1).
  float unit() {
    return static_cast<float>(static_cast<double>(next() >> 40) / (1 << 23) - 1.0);
  }

 private:
  uint64_t state_;
};

}  // namespace torchrec_mpe
