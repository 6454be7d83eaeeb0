// Weights of the best linear guess, on a CPU: an image at a time, whose matrix stays in the cache.
// PyTorch would make all matrices first, as large as the largest, and factor one after the other.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <vector>

namespace fused_ddpm {

using at::Tensor;

// covariance: (n, n); mask: bool (N, n); off: (N, C, n), like what is returned.
template <typename T>
void weights_of_images(Tensor& weights, const Tensor& covariance, const Tensor& mask,
                       const Tensor& off) {
  const int64_t channels = off.size(1), n = off.size(2);
  const T *const K = covariance.const_data_ptr<T>(), *const given = off.const_data_ptr<T>();
  const bool* const set = mask.const_data_ptr<bool>();
  T* const out = weights.mutable_data_ptr<T>();
  at::parallel_for(0, off.size(0), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;  // a thread's own
    std::vector<int64_t> places;
    for (int64_t i = begin; i < end; ++i) {
      places.clear();
      for (int64_t j = 0; j < n; ++j)
        if (set[i * n + j]) places.push_back(j);
      const int64_t m = places.size(), *const o = places.data();
      const Tensor among = at::empty({m, m}, off.options());
      Tensor right = at::empty({channels, m}, off.options());
      T *a = among.mutable_data_ptr<T>(), *const r = right.mutable_data_ptr<T>();
      for (int64_t row = 0; row < m; ++row, a += m)  // what is right of the diagonal: half is read
        for (int64_t column = row; column < m; ++column) a[column] = K[o[row] * n + o[column]];
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t j = 0; j < m; ++j) r[c * m + j] = given[(i * channels + c) * n + o[j]];
      // In columns, as LAPACK reads a matrix, that half is the lower one.
      const Tensor root = std::get<0>(at::linalg_cholesky_ex(among.mT()));
      right = at::cholesky_solve(right.mT(), root).mT().contiguous();
      const T* const solved = right.const_data_ptr<T>();
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t j = 0; j < m; ++j) out[(i * channels + c) * n + o[j]] = solved[c * m + j];
    }
  });
}

Tensor linear_weights_cpu(const Tensor& covariance, const Tensor& mask, const Tensor& off) {
  TORCH_CHECK_VALUE(off.dim() == 3 && mask.sizes() == at::IntArrayRef({off.size(0), off.size(2)}) &&
                        covariance.sizes() == at::IntArrayRef({off.size(2), off.size(2)}),
                    "linear_weights: covariance ", covariance.sizes(), ", mask ", mask.sizes(),
                    " and off ", off.sizes(), " do not fit (n, n), (N, n) and (N, C, n)");
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool && covariance.scalar_type() == off.scalar_type(),
                   "linear_weights: mask must be bool, covariance and off of one type");
  Tensor weights = at::zeros_like(off, at::MemoryFormat::Contiguous);
  AT_DISPATCH_FLOATING_TYPES(off.scalar_type(), "linear_weights", [&] {
    weights_of_images<scalar_t>(weights, covariance.contiguous(), mask.contiguous(),
                                off.contiguous());
  });
  return weights;
}

TORCH_LIBRARY_IMPL(fused_ddpm, CPU, m) { m.impl("linear_weights", linear_weights_cpu); }

}  // namespace fused_ddpm
