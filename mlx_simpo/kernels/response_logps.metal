// log p(target) of rows of logits, and its gradient, in one launch: one threadgroup a row.
//
//   z_v = x_v · scale                              without a softcap
//   z_v = softcap · tanh(x_v · scale / softcap)    with one
//   logp = z_y − log Σ_v exp z_v
//   gradient_v = ∂logp/∂x_v = ([v = y] − exp(z_v − log Σ)) · scale · (1 − (z_v / softcap)²)
//
// x are the products of the head's weights and a hidden row, y is the target. Everything between
// reading x and writing the gradient is float32. An IGNORED target has log-probability 0 and no
// gradient; one that is no token at all gives NaN, never another token's value.
//
// The launcher (launch.py) declares the threadgroup's memory and calls `row`; the same text is
// compiled for CUDA behind cuda.h, which is why attributes of a thread come in as arguments.

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#endif

namespace response_logps {

// A target that is left out, as in PyTorch.
constant constexpr int IGNORED = -100;

// Which of its threads this one is.
struct Place {
  uint index;  // among the threads of the row
  uint count;  // of those
  uint lane;   // within the simdgroup
  uint simdgroup;
  uint simdgroups;
};

// Largest value, and Σ exp(value − largest), of some values; −∞ and 0 of none.
struct Total {
  float greatest;
  float sum;
};

// exp(value − greatest); 0 where both are −∞. NaN stays NaN.
METAL_FUNC float relative(float value, float greatest) {
  return metal::precise::exp(value - (greatest == -INFINITY ? 0.0f : greatest));
}

// A logit from what the head's matrix product left.
METAL_FUNC float logit(float product, float scale, float softcap) {
  float scaled = product * scale;
  return softcap > 0.0f ? softcap * metal::precise::tanh(scaled / softcap) : scaled;
}

// The total of a simdgroup's totals, in all of its lanes.
METAL_FUNC Total over_simdgroup(Total own) {
  float greatest = metal::simd_max(own.greatest);
  return {greatest, metal::simd_sum(own.sum * relative(own.greatest, greatest))};
}

// The total of a row of `size` logits, in all threads of the threadgroup.
//
// Each thread reads READS neighbours at a time. `maxima` and `sums` are written once and then only
// read, so that one barrier is enough.
template <int READS, typename Products>
METAL_FUNC Total total_of(
    Products products,
    int size,
    float scale,
    float softcap,
    threadgroup float* maxima,
    threadgroup float* sums,
    Place place) {
  Total own = {-INFINITY, 0.0f};
  for (int start = int(place.index) * READS; start < size; start += int(place.count) * READS) {
    float values[READS];
    float greatest = own.greatest;
    for (int i = 0; i < READS; ++i) {
      values[i] = start + i < size ? logit(float(products[start + i]), scale, softcap) : -INFINITY;
      greatest = metal::max(greatest, values[i]);
    }
    own.sum *= relative(own.greatest, greatest);
    for (int i = 0; i < READS; ++i) {
      own.sum += relative(values[i], greatest);
    }
    own.greatest = greatest;
  }

  own = over_simdgroup(own);
  if (place.lane == 0) {
    maxima[place.simdgroup] = own.greatest;
    sums[place.simdgroup] = own.sum;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  bool used = place.lane < place.simdgroups;
  Total of_simdgroup = {
      used ? maxima[place.lane] : -INFINITY,
      used ? sums[place.lane] : 0.0f,
  };
  return over_simdgroup(of_simdgroup);
}

// A row of `size` products of type T: writes its log-probability and, with GRADIENT, the gradient.
template <typename T, bool GRADIENT, typename Products>
METAL_FUNC void row(
    Products products,
    int size,
    int target,
    float scale,
    float softcap,
    device float* logp,
    device T* gradient,
    threadgroup float* maxima,
    threadgroup float* sums,
    Place place) {
  // 16 bytes a read, however T is.
  constexpr int READS = 16 / sizeof(T);

  if (target == IGNORED) {  // the same for all threads: none of them waits at the barrier
    if (place.index == 0) {
      *logp = 0.0f;
    }
    if (GRADIENT) {
      for (int v = int(place.index); v < size; v += int(place.count)) {
        gradient[v] = T(0.0f);
      }
    }
    return;
  }

  Total total = total_of<READS>(products, size, scale, softcap, maxima, sums, place);
  bool exists = target >= 0 && target < size;
  if (place.index == 0) {
    float picked = exists ? logit(float(products[target]), scale, softcap) : NAN;
    *logp = (picked - total.greatest) - metal::precise::log(total.sum);
  }
  if (!GRADIENT) {
    return;
  }
  for (int start = int(place.index) * READS; start < size; start += int(place.count) * READS) {
    for (int v = start; v < start + READS && v < size; ++v) {
      float value = logit(float(products[v]), scale, softcap);
      float slope = (v == target ? 1.0f : 0.0f) - relative(value, total.greatest) / total.sum;
      float capped = softcap > 0.0f ? value / softcap : 0.0f;
      gradient[v] = T(exists ? slope * scale * (1.0f - capped * capped) : NAN);
    }
  }
}

}  // namespace response_logps
