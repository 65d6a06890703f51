// log p(target) of rows of logits, and its gradient, in one launch: one threadgroup per row.
//
//   z_v = x_v · scale                              without a softcap
//   z_v = softcap · tanh(x_v · scale / softcap)    with one
//   logp = z_y − log Σ_v exp z_v
//   d_x_v = ∂logp/∂x_v = ([v = y] − exp(z_v − log Σ)) · scale · (1 − (z_v / softcap)²)
//
// x are the raw logits (the head's weights times a hidden state), y is the target. Everything
// between reading x and writing the gradient is float32. A row whose target is IGNORE_INDEX has
// log-probability 0 and gradient 0; a target that is no token gives NaN, never another token's
// value.
//
// The launcher (launch.py) declares the threadgroup's memory and calls `process_row`. The same text
// is compiled for CUDA behind cuda.h, which is why a thread's position comes in as an argument.

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#endif

namespace response_logps {

// The target of a row that does not count; PyTorch's default ignore_index.
constant constexpr int IGNORE_INDEX = -100;

// The position of a thread among those of its row.
struct ThreadPosition {
  uint index;       // among the threads of the row
  uint count;       // of threads of the row
  uint lane;        // within its simdgroup
  uint simdgroup;   // index of its simdgroup
  uint simdgroups;  // of the row
};

// The largest of some values and Σ exp(value − max_value); −∞ and 0 for no values.
struct MaxAndSum {
  float max_value;
  float sum;
};

// exp(value − max_value), and 0 where both are −∞, whose difference would be NaN. NaN stays NaN.
METAL_FUNC float exp_minus_max(float value, float max_value) {
  return metal::precise::exp(value - (max_value == -INFINITY ? 0.0f : max_value));
}

// A logit from a raw logit.
METAL_FUNC float logit(float raw_logit, float scale, float softcap) {
  float scaled = raw_logit * scale;
  return softcap > 0.0f ? softcap * metal::precise::tanh(scaled / softcap) : scaled;
}

// Combines the partial results of a simdgroup's lanes; every lane gets the result.
METAL_FUNC MaxAndSum combine_lanes(MaxAndSum own) {
  float max_value = metal::simd_max(own.max_value);
  return {max_value, metal::simd_sum(own.sum * exp_minus_max(own.max_value, max_value))};
}

// Max and sum of a row of `size` logits, in one pass over it; every thread gets the result.
//
// Each thread reads READS neighbouring values at a time and rescales its sum when its max grows (an
// online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867). `maxima` and `sums` are written
// once and only read from then on, so that one barrier is enough.
template <int READS, typename RawLogits>
METAL_FUNC MaxAndSum reduce_row(
    RawLogits raw_logits,
    int size,
    float scale,
    float softcap,
    threadgroup float* maxima,
    threadgroup float* sums,
    ThreadPosition position) {
  MaxAndSum own = {-INFINITY, 0.0f};
  for (int start = int(position.index) * READS; start < size;
       start += int(position.count) * READS) {
    float values[READS];
    float max_value = own.max_value;
    for (int i = 0; i < READS; ++i) {
      values[i] =
          start + i < size ? logit(float(raw_logits[start + i]), scale, softcap) : -INFINITY;
      max_value = metal::max(max_value, values[i]);
    }
    own.sum *= exp_minus_max(own.max_value, max_value);
    for (int i = 0; i < READS; ++i) {
      own.sum += exp_minus_max(values[i], max_value);
    }
    own.max_value = max_value;
  }

  own = combine_lanes(own);
  if (position.lane == 0) {
    maxima[position.simdgroup] = own.max_value;
    sums[position.simdgroup] = own.sum;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  // A lane takes over the result of one simdgroup; lanes beyond the last one contribute nothing,
  // since that memory was never written.
  bool has_simdgroup = position.lane < position.simdgroups;
  MaxAndSum of_simdgroup = {
      has_simdgroup ? maxima[position.lane] : -INFINITY,
      has_simdgroup ? sums[position.lane] : 0.0f,
  };
  return combine_lanes(of_simdgroup);
}

// Writes the log-probability of one row of `size` raw logits and, with GRADIENT, its gradient.
template <typename T, bool GRADIENT, typename RawLogits>
METAL_FUNC void process_row(
    RawLogits raw_logits,
    int size,
    int target,
    float scale,
    float softcap,
    device float* logp,
    device T* d_raw_logits,
    threadgroup float* maxima,
    threadgroup float* sums,
    ThreadPosition position) {
  // 16 bytes per read, whatever T is.
  constexpr int READS = 16 / sizeof(T);

  // All threads of a row return here or none does: no thread waits alone at the barrier. Outputs
  // are not initialised, so that zeros have to be written.
  if (target == IGNORE_INDEX) {
    if (position.index == 0) {
      *logp = 0.0f;
    }
    if (GRADIENT) {
      for (int v = int(position.index); v < size; v += int(position.count)) {
        d_raw_logits[v] = T(0.0f);
      }
    }
    return;
  }

  MaxAndSum total = reduce_row<READS>(raw_logits, size, scale, softcap, maxima, sums, position);
  bool is_token = target >= 0 && target < size;
  if (position.index == 0) {
    float target_logit = is_token ? logit(float(raw_logits[target]), scale, softcap) : NAN;
    *logp = (target_logit - total.max_value) - metal::precise::log(total.sum);
  }
  if (!GRADIENT) {
    return;
  }
  for (int start = int(position.index) * READS; start < size;
       start += int(position.count) * READS) {
    for (int v = start; v < start + READS && v < size; ++v) {
      float value = logit(float(raw_logits[v]), scale, softcap);
      float d_logit =
          (v == target ? 1.0f : 0.0f) - exp_minus_max(value, total.max_value) / total.sum;
      float capped = softcap > 0.0f ? value / softcap : 0.0f;
      d_raw_logits[v] = T(is_token ? d_logit * scale * (1.0f - capped * capped) : NAN);
    }
  }
}

}  // namespace response_logps
