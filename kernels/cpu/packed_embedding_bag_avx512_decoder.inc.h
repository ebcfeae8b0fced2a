// Decoding transformed rows with AVX-512 VBMI: all components of a row are cut out by one byte permutation and one
// multishift. Included by packed_embedding_bag_avx512.cpp, after packed_embedding_bag_coding.inc.h.

// Adds up the components of transformed rows.
//
// A row lies in 32 bytes, from byte `position` and bit `shift` on; both are in every byte of the ring's words. permute
// brings the first bytes of components 2 i and 2 i + 1 to lane i, shift their codes to the upper bits of the mantissas
// of its two words: under the exponent of 1 they are 1 + code / 256.
class Decoder {
 public:
  struct Sum {
    __m512 vector;
  };

  // Without runs there is no transformed row.
  Decoder(const PackedTable&, const CheckedRuns* runs)
      : none_(runs == nullptr ? 0 : runs->none()), runs_(runs == nullptr ? 0 : none_ + 1) {
    for (int32_t k = 0; k < static_cast<int32_t>(runs_.size()); ++k) {
      fill((*runs)[k], runs_[k]);
    }
  }

  // What Ring::run is of rows that are not transformed.
  int32_t none() const {
    return none_;
  }

  __attribute__((always_inline)) void add(Sum& sum, const uint8_t* weights, const Ring& ring, int slot) const {
    const Run& run = runs_[ring.run[slot]];
    const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + ring.start[slot]));
    const __m512i permute = _mm512_add_epi8(_mm512_load_si512(run.permute), _mm512_set1_epi32(ring.position[slot]));
    const __m512i shift = _mm512_add_epi8(_mm512_load_si512(run.shift), _mm512_set1_epi32(ring.shift[slot]));
    __m512i words = _mm512_permutexvar_epi8(permute, _mm512_castsi256_si512(row));
    words = _mm512_multishift_epi64_epi8(shift, words);
    // (words & mask) | 1.0f
    words = _mm512_ternarylogic_epi32(words, _mm512_load_si512(run.mask), _mm512_set1_epi32(0x3f800000), 0xea);
    const __m512 values = _mm512_fmadd_ps(_mm512_castsi512_ps(words), _mm512_load_ps(run.scale),
                                          _mm512_load_ps(run.offset));
    sum.vector = _mm512_fmadd_ps(values, _mm512_set1_ps(ring.weight[slot]), sum.vector);
  }

  __attribute__((always_inline)) static void store(const Sum& sum, float* components) {
    _mm512_store_ps(components, sum.vector);
  }

 private:
  struct Run {
    alignas(64) uint8_t permute[64];
    alignas(64) uint8_t shift[64];
    alignas(64) uint32_t mask[kMaxComponents];
    alignas(64) float scale[kMaxComponents];
    alignas(64) float offset[kMaxComponents];
  };

  static void fill(const CheckedRun& checked, Run& run) {
    int bit = 0;
    int level = 0;
    int lane_byte = 0;
    for (int c = 0; c < kMaxComponents; ++c) {
      lane_byte = c % 2 == 0 ? bit / 8 : lane_byte;
      const int in_lane = bit - 8 * lane_byte;
      for (int byte = 0; byte < 4; ++byte) {
        run.permute[4 * c + byte] = static_cast<uint8_t>(lane_byte + c % 2 * 4 + byte);
        // A code's lowest bit goes to bit 15 of its word; shifts are taken modulo 64.
        run.shift[4 * c + byte] = static_cast<uint8_t>((in_lane + 8 * byte - 15) & 63);
      }
      bit += checked.widths[c];
      run.mask[c] = ((1u << checked.widths[c]) - 1) << 15;
      run.scale[c] = 0.0f;
      run.offset[c] = 0.0f;
      if (checked.widths[c] > 0) {
        run.scale[c] = 256.0f * from_bfloat16(checked.levels[level++]);
        run.offset[c] = from_bfloat16(checked.levels[level++]) - run.scale[c];
      }
    }
  }

  int32_t none_;
  std::vector<Run> runs_;
};
