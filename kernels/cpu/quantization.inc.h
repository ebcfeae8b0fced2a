// The kernels of quantization.h, for the instruction set and in the namespace of the file that includes this.
// Rounding adds and takes away 1.5 * 2^(mantissa bits): to nearest even in two additions on any instruction set. The
// code range is cut in between, where codes are integers apart and a value is inside if cutting changes nothing.

template <typename T>
struct Lanes;

typedef double Double8 __attribute__((vector_size(64)));

// Lanes::sums adds up the lanes of each of 8 vectors, two neighbours a step.
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
  static constexpr int count = 16;
  static constexpr float rounder = 12582912.0f;

  // Within 128 bits: shuffles across are twice as slow.
  static Vector pairs(const Vector& a, const Vector& b) {
    return TORCHREC_MPE_SHUFFLE(Mask, a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           TORCHREC_MPE_SHUFFLE(Mask, a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  }
  static Double8 sums(const Vector* v) {
    const Vector a = pairs(pairs(v[0], v[1]), pairs(v[2], v[3]));
    const Vector b = pairs(pairs(v[4], v[5]), pairs(v[6], v[7]));
    const Vector halves =
        TORCHREC_MPE_SHUFFLE(Mask, a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        TORCHREC_MPE_SHUFFLE(Mask, a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#ifdef TORCHREC_MPE_NO_SHUFFLEVECTOR
    // No shuffle to fewer lanes: the sums are the lower half of as many lanes.
    const Vector both = __builtin_shuffle(halves, Mask{0, 1, 2, 3, 8, 9, 10, 11}) +
                        __builtin_shuffle(halves, Mask{4, 5, 6, 7, 12, 13, 14, 15});
    Half sums;
    __builtin_memcpy(&sums, &both, sizeof(sums));
#else
    const Half sums = __builtin_shufflevector(halves, halves, 0, 1, 2, 3, 8, 9, 10, 11) +
                      __builtin_shufflevector(halves, halves, 4, 5, 6, 7, 12, 13, 14, 15);
#endif
    return __builtin_convertvector(sums, Double8);
  }
};

template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
  static constexpr int count = 8;
  static constexpr double rounder = 6755399441055744.0;

  static Vector pairs(const Vector& a, const Vector& b) {
    return TORCHREC_MPE_SHUFFLE(Mask, a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           TORCHREC_MPE_SHUFFLE(Mask, a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  }
  static Double8 sums(const Vector* v) {
    return pairs(pairs(pairs(v[0], v[1]), pairs(v[2], v[3])), pairs(pairs(v[4], v[5]), pairs(v[6], v[7])));
  }
};

template <typename T>
using Vector = typename Lanes<T>::Vector;

// `count` values, the other lanes 0. Whole vectors must not share a variable with parts: they would go through memory.
template <typename T>
inline Vector<T> load(const T* from, int64_t count = Lanes<T>::count) {
  if (count >= Lanes<T>::count) {
    Vector<T> whole;
    __builtin_memcpy(&whole, from, sizeof(whole));
    return whole;
  }
  Vector<T> part = {};
  if (count == Lanes<T>::count / 2) {
    __builtin_memcpy(&part, from, sizeof(part) / 2);
  } else {
    __builtin_memcpy(&part, from, count * sizeof(T));
  }
  return part;
}

template <typename T>
inline void store(T* to, const Vector<T>& v, int64_t count = Lanes<T>::count) {
  if (count >= Lanes<T>::count) {
    __builtin_memcpy(to, &v, sizeof(v));
    return;
  }
  const Vector<T> part = v;
  if (count == Lanes<T>::count / 2) {
    __builtin_memcpy(to, &part, sizeof(part) / 2);
  } else {
    __builtin_memcpy(to, &part, count * sizeof(T));
  }
}

template <typename T>
inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

template <typename T>
inline Vector<T> cut(Vector<T> v, const Vector<T>& low, const Vector<T>& high) {
  v = v < low ? low : v;  // NaN stays NaN
  return v > high ? high : v;
}

// The code ranges and step sizes of M candidates, in registers as far as those go.
template <typename T, int M>
struct Candidates {
  Vector<T> inverse_step[M + 1], low[M + 1], high[M + 1];
  explicit Candidates(const Parameters<T>& q) {
#pragma GCC unroll 8
    for (int k = 0; k < M; ++k) {
      inverse_step[k] = broadcast<T>(q.inverse_step[k]);
      low[k] = broadcast<T>(q.low[k]);
      high[k] = broadcast<T>(q.high[k]);
    }
  }
};

template <typename T>
inline double lane_sum(const Vector<T> v) {
  T lanes[Lanes<T>::count];
  __builtin_memcpy(lanes, &v, sizeof(lanes));
  double sum = 0;
  for (const T lane : lanes) {
    sum += lane;
  }
  return sum;
}

// Adds `from` to `to` and clears it.
template <typename T>
inline void flush(T* from, double* to, int64_t count) {
  for (int64_t d = 0; d < count; ++d) {
    to[d] += from[d];
    from[d] = 0;
  }
}

// Whole: the dimension is a number of whole vectors. Code for parts of vectors has calls, around which registers are lost.
template <typename T, int M, bool Whole>
void expected_forward_of(const Block<T>& block, const Parameters<T>& q, bool pooled, T* out) {
  constexpr T r = Lanes<T>::rounder;
  const Candidates<T, M> c(q);
  for (int64_t i = 0; i < block.size; ++i) {
    const T* group = q.groups + int64_t{block.line[i]} * kGroupFields;
    const T* zero = q.zero_rows + block.table[i] * q.padded_dim;
    const T* row = block.rows + i * q.dim;
    T* to = out + block.offset[i];
    for (int64_t d = 0; d < q.dim; d += Lanes<T>::count) {
      const int64_t count = Whole ? Lanes<T>::count : q.dim - d;
      const Vector<T> beta = load(q.beta + d);
      const Vector<T> centred = load(row + d, count) - beta;
      Vector<T> sum = load(zero + d) * group[kZeroP] + beta * group[kNonzeroP];
#pragma GCC unroll 8
      for (int k = 0; k < M; ++k) {
        const Vector<T> v = cut<T>(centred * c.inverse_step[k] + r, c.low[k], c.high[k]);
        sum += (v - r) * group[kStepTimesP + k];
      }
      if (pooled) {
        sum = load(to + d, count) + sum * block.weight[i];
      }
      store(to + d, sum, count);
    }
  }
}

// alpha's gradient is sum p * g * (code - (inside ? v : 0)). The first term comes from the groups' sums of g * code, the
// second here from sums of p * g * (x - beta).
template <typename T, int M, bool Whole>
void expected_backward_of(const Block<T>& block, const Parameters<T>& q, const T* grad, T* grad_rows, T* grad_weights,
                          T* scratch, const Sums& sums) {
  constexpr T r = Lanes<T>::rounder;
  constexpr int kDots = M + 2 > 8 ? 16 : 8;
  T* grad_beta = scratch;
  T* grad_zero = scratch + q.padded_dim;
  Vector<T> inside_sums[M + 1] = {};
  for (int64_t i = 0; i < block.size; ++i) {
    const T* group = q.groups + int64_t{block.line[i]} * kGroupFields;
    const T* zero = q.zero_rows + block.table[i] * q.padded_dim;
    const T* row = block.rows + i * q.dim;
    const T* from = grad + block.offset[i];
    const T weight = block.weight[i];
    Vector<T> dots[kDots] = {};  // of the gradient with each candidate's codes, the zero row and beta
    for (int64_t d = 0; d < q.dim; d += Lanes<T>::count) {
      const int64_t count = Whole ? Lanes<T>::count : q.dim - d;
      const Vector<T> beta = load(q.beta + d);
      const Vector<T> centred = load(row + d, count) - beta;
      const Vector<T> g = load(from + d, count);
      const Vector<T> weighted = g * weight;
      const Vector<T> product = weighted * centred;
      Vector<T> inside_p = {}, inside_scaled_p = {};
#pragma GCC unroll 8
      for (int k = 0; k < M; ++k) {
        const Vector<T> rounded = centred * q.inverse_step[k] + r;
        const Vector<T> bounded = cut<T>(rounded, broadcast(q.low[k]), broadcast(q.high[k]));
        const auto inside = bounded == rounded;
        dots[k] += g * (bounded - r);
        inside_p = inside ? inside_p + group[kP + k] : inside_p;
        inside_scaled_p = inside ? inside_scaled_p + group[kScaledP + k] : inside_scaled_p;
        inside_sums[k] = inside ? inside_sums[k] + product * group[kP + k] : inside_sums[k];
      }
      store(grad_rows + i * q.dim + d, weighted * inside_p, count);
      store(grad_beta + d, load(grad_beta + d) + weighted * (group[kAllScaledP] - inside_scaled_p));
      store(grad_zero + d, load(grad_zero + d) + weighted * group[kZeroP]);
      dots[M] += g * load(zero + d);
      dots[M + 1] += g * beta;
    }
    double* group_sums = sums.groups + int64_t{block.line[i]} * kSums;
    for (int k = 0; k < kDots; k += 8) {
      const Double8 dot = Lanes<T>::sums(dots + k);
      Double8 sum;
      __builtin_memcpy(&sum, group_sums + k, sizeof(sum));
      sum += dot * static_cast<double>(weight);
      __builtin_memcpy(group_sums + k, &sum, sizeof(sum));
      if (grad_weights != nullptr) {
        double whole = k == 0 ? 0 : grad_weights[i];
        for (int c = k; c < k + 8 && c < M + 2; ++c) {
          const T factor = c < M ? group[kStepTimesP + c] : group[c == M ? kZeroP : kNonzeroP];
          whole += factor * dot[c - k];
        }
        grad_weights[i] = static_cast<T>(whole);
      }
    }
    if (grad_weights != nullptr) {
      grad_weights[i] *= block.inverse_length[i];
    }
    if (i + 1 == block.size || block.table[i + 1] != block.table[i]) {
      flush(grad_zero, sums.zero_rows + block.table[i] * q.padded_dim, q.padded_dim);
    }
  }
  flush(grad_beta, sums.beta, q.padded_dim);
  for (int k = 0; k < M; ++k) {
    sums.alpha[k] -= lane_sum<T>(inside_sums[k]) * q.inverse_step[k];
  }
}

template <typename T>
inline bool is_whole(const Parameters<T>& q) {
  return q.dim == q.padded_dim;
}

// By the number of candidates of more than 0 bits.
template <typename T, bool Whole>
void expected_forward_by_number(const Block<T>& block, const Parameters<T>& q, bool pooled, T* out) {
  constexpr decltype(&expected_forward_of<T, 0, Whole>) by_number[] = {
      expected_forward_of<T, 0, Whole>, expected_forward_of<T, 1, Whole>, expected_forward_of<T, 2, Whole>,
      expected_forward_of<T, 3, Whole>, expected_forward_of<T, 4, Whole>, expected_forward_of<T, 5, Whole>,
      expected_forward_of<T, 6, Whole>, expected_forward_of<T, 7, Whole>, expected_forward_of<T, 8, Whole>};
  by_number[q.num_candidates](block, q, pooled, out);
}

template <typename T>
void expected_forward(const Block<T>& block, const Parameters<T>& q, bool pooled, T* out) {
  (is_whole(q) ? expected_forward_by_number<T, true> : expected_forward_by_number<T, false>)(block, q, pooled, out);
}

template <typename T, bool Whole>
void expected_backward_by_number(const Block<T>& block, const Parameters<T>& q, const T* grad, T* grad_rows,
                                 T* grad_weights, T* scratch, const Sums& sums) {
  constexpr decltype(&expected_backward_of<T, 0, Whole>) by_number[] = {
      expected_backward_of<T, 0, Whole>, expected_backward_of<T, 1, Whole>, expected_backward_of<T, 2, Whole>,
      expected_backward_of<T, 3, Whole>, expected_backward_of<T, 4, Whole>, expected_backward_of<T, 5, Whole>,
      expected_backward_of<T, 6, Whole>, expected_backward_of<T, 7, Whole>, expected_backward_of<T, 8, Whole>};
  by_number[q.num_candidates](block, q, grad, grad_rows, grad_weights, scratch, sums);
}

template <typename T>
void expected_backward(const Block<T>& block, const Parameters<T>& q, const T* grad, T* grad_rows, T* grad_weights,
                       T* scratch, const Sums& sums) {
  (is_whole(q) ? expected_backward_by_number<T, true> : expected_backward_by_number<T, false>)(
      block, q, grad, grad_rows, grad_weights, scratch, sums);
}

template <typename T, bool Whole>
void fixed_forward_of(const Block<T>& block, const Parameters<T>& q, bool pooled, T* out) {
  constexpr T r = Lanes<T>::rounder;
  for (int64_t i = 0; i < block.size; ++i) {
    const int k = block.line[i];
    const T* row = block.rows + i * q.dim;
    // No branch on the width: a 0-bit row has code 0 and its zero row for an offset.
    const T* offsets[] = {q.beta, q.zero_rows + block.table[i] * q.padded_dim};
    const T* offset = offsets[q.is_zero[k] != 0];
    T* to = out + block.offset[i];
    for (int64_t d = 0; d < q.dim; d += Lanes<T>::count) {
      const int64_t count = Whole ? Lanes<T>::count : q.dim - d;
      const Vector<T> v = (load(row + d, count) - load(q.beta + d)) / q.step[k];
      Vector<T> quantized = (cut<T>(v + r, broadcast(q.low[k]), broadcast(q.high[k])) - r) * q.step[k] + load(offset + d);
      if (pooled) {
        quantized = load(to + d, count) + quantized * block.weight[i];
      }
      store(to + d, quantized, count);
    }
  }
}

template <typename T>
void fixed_forward(const Block<T>& block, const Parameters<T>& q, bool pooled, T* out) {
  (is_whole(q) ? fixed_forward_of<T, true> : fixed_forward_of<T, false>)(block, q, pooled, out);
}

template <typename T, bool Whole>
void fixed_backward_of(const Block<T>& block, const Parameters<T>& q, const T* grad, T* grad_rows, T* grad_weights,
                       T* scratch, const Sums& sums) {
  constexpr T r = Lanes<T>::rounder;
  T* grad_beta = scratch;
  T* grad_zero = scratch + q.padded_dim;
  Vector<T> grad_alpha[kMaxCandidates] = {};
  for (int64_t i = 0; i < block.size; ++i) {
    const int k = block.line[i];
    const T* row = block.rows + i * q.dim;
    const T* offsets[] = {q.beta, q.zero_rows + block.table[i] * q.padded_dim};
    const T* offset = offsets[q.is_zero[k] != 0];
    const T* from = grad + block.offset[i];
    Vector<T> alpha_sum = {}, dot = {};
    for (int64_t d = 0; d < q.dim; d += Lanes<T>::count) {
      const int64_t count = Whole ? Lanes<T>::count : q.dim - d;
      const Vector<T> g = load(from + d, count);
      const Vector<T> weighted = g * block.weight[i];
      const Vector<T> v = (load(row + d, count) - load(q.beta + d)) / q.step[k];
      const Vector<T> rounded = v + r;
      const Vector<T> bounded = cut<T>(rounded, broadcast(q.low[k]), broadcast(q.high[k]));
      const Vector<T> code = bounded - r;
      const auto inside = bounded == rounded;
      alpha_sum += weighted * (code - (inside ? v : Vector<T>{}));
      store(grad_rows + i * q.dim + d, inside ? weighted * (1 - q.is_zero[k]) : Vector<T>{}, count);
      store(grad_beta + d, load(grad_beta + d) + (inside ? Vector<T>{} : weighted * q.scale[k]));
      store(grad_zero + d, load(grad_zero + d) + weighted * q.is_zero[k]);
      dot += g * (code * q.step[k] + load(offset + d));
    }
    grad_alpha[k] += alpha_sum;
    if (grad_weights != nullptr) {
      grad_weights[i] = static_cast<T>(lane_sum<T>(dot)) * block.inverse_length[i];
    }
    if (i + 1 == block.size || block.table[i + 1] != block.table[i]) {
      flush(grad_zero, sums.zero_rows + block.table[i] * q.padded_dim, q.padded_dim);
    }
  }
  flush(grad_beta, sums.beta, q.padded_dim);
  for (int k = 0; k < kMaxCandidates; ++k) {
    sums.alpha[k] += lane_sum<T>(grad_alpha[k]);
  }
}

template <typename T>
void fixed_backward(const Block<T>& block, const Parameters<T>& q, const T* grad, T* grad_rows, T* grad_weights,
                    T* scratch, const Sums& sums) {
  (is_whole(q) ? fixed_backward_of<T, true> : fixed_backward_of<T, false>)(block, q, grad, grad_rows, grad_weights,
                                                                           scratch, sums);
}

template <typename T>
void add_rows(int64_t size, int64_t dim, const T* from, const int64_t* from_offset, const T* weight, T* to,
              const int64_t* to_offset) {
  constexpr int64_t kAhead = 12;  // rows
  for (int64_t i = 0; i < size; ++i) {
    if (i + kAhead < size) {
      __builtin_prefetch(from + from_offset[i + kAhead]);
      __builtin_prefetch(to + to_offset[i + kAhead], 1);
    }
    const T* a = from + from_offset[i];
    T* b = to + to_offset[i];
    for (int64_t d = 0; d < dim; d += Lanes<T>::count) {
      store(b + d, load(b + d, dim - d) + load(a + d, dim - d) * weight[i], dim - d);
    }
  }
}

template <typename T>
void dot_rows(int64_t size, int64_t dim, const T* a, const int64_t* a_offset, const T* b, const int64_t* b_offset,
              const T* weight, T* dots) {
  for (int64_t i = 0; i < size; ++i) {
    Vector<T> sum = {};
    for (int64_t d = 0; d < dim; d += Lanes<T>::count) {
      sum += load(a + a_offset[i] + d, dim - d) * load(b + b_offset[i] + d, dim - d);
    }
    dots[i] = static_cast<T>(lane_sum<T>(sum)) * weight[i];
  }
}

template <typename T>
Kernels<T> kernels(bool search) {
  return {search ? expected_forward<T> : fixed_forward<T>, search ? expected_backward<T> : fixed_backward<T>,
          add_rows<T>, dot_rows<T>};
}

template Kernels<float> kernels<float>(bool search);
template Kernels<double> kernels<double>(bool search);
