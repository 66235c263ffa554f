#include "rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu_versions.h"

namespace fastadapt {
namespace {

using torch::headeronly::ScalarType;

// e^x of -87 <= x <= 88, outside of which it stays where it is: 2^n e^r with |r| <= ln(2) / 2, e^r by its series.
FASTADAPT_INLINE float exponential(float x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its last bits then hold
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float rounded = x * 1.44269504f + kRounder, n = rounded - kRounder;
  const float r = (x - n * 0.693145751953125f) - n * 1.42860682e-6f;  // ln(2) in two parts, the first of 16 bits
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  return series * std::bit_cast<float>((std::bit_cast<uint32_t>(rounded) << 23) + 0x3f800000u);
}

FASTADAPT_INLINE double exponential(double x) { return std::exp(x); }

// The normal distribution: P(X <= z) and the density at z.
template <class T>
struct Normal {
  T below, density;
};

// P(X > |z|) = density times a polynomial of t = 1 / (1 + 0.26 |z|), fitted at Chebyshev's nodes to 5e-9 on |z| <= 14.
FASTADAPT_INLINE Normal<float> normal(float z) {
  const float bell = exponential(-0.5f * z * z), t = 1.0f / (1.0f + 0.26f * std::abs(z));
  float sum = 0.0643781174f;
  sum = sum * t - 0.32171632f;
  sum = sum * t + 0.535462464f;
  sum = sum * t - 0.338200882f;
  sum = sum * t + 0.346353392f;
  sum = sum * t + 0.0919119989f;
  sum = sum * t + 0.20858357f;
  sum = sum * t + 0.205689958f;
  sum = sum * t + 0.207537708f;
  const float tail = 0.5f * bell * t * sum;
  return {z > 0 ? 1 - tail : tail, bell * 0.398942280f};
}

FASTADAPT_INLINE Normal<double> normal(double z) {
  return {0.5 * std::erfc(-z * 0.70710678118654752440), std::exp(-0.5 * z * z) * 0.39894228040143267794};
}

template <class T>
FASTADAPT_INLINE T gate(T z) {
  return 1 / (1 + exponential(T(-1.702) * z));
}

template <Activation kActivation, class T>
FASTADAPT_INLINE T value(T z) {
  if constexpr (kActivation == Activation::kRelu) return z < 0 ? T(0) : z;
  if constexpr (kActivation == Activation::kGelu) return z * normal(z).below;
  if constexpr (kActivation == Activation::kQuickGelu) return z * gate(z);
  return z;
}

template <Activation kActivation, class T>
FASTADAPT_INLINE T slope(T z) {
  if constexpr (kActivation == Activation::kRelu) return T(z > 0);
  if constexpr (kActivation == Activation::kGelu) {
    const Normal<T> at = normal(z);
    return at.below + z * at.density;
  }
  if constexpr (kActivation == Activation::kQuickGelu) {
    const T g = gate(z);
    return g * (1 + T(1.702) * z * (1 - g));
  }
  return 1;
}

template <class T>
struct Statistics {
  T mean, rstd;
};

// The sum of term(0 <= j < cols) in four sums at a time, so that an addition need not wait for the one before it.
template <class T, class F>
FASTADAPT_INLINE T sum_of(int64_t cols, const F& term) {
  const int64_t quarter = cols / 4;
  T a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t j = 0; j < quarter; ++j) {
    a += term(j);
    b += term(quarter + j);
    c += term(2 * quarter + j);
    d += term(3 * quarter + j);
  }
  for (int64_t j = 4 * quarter; j < cols; ++j) a += term(j);
  return (a + b) + (c + d);
}

template <class T>
FASTADAPT_INLINE Statistics<T> statistics(const T* x, int64_t cols, double eps) {
  const T mean = sum_of<T>(cols, [=](int64_t j) FASTADAPT_INLINED { return x[j]; }) / cols;
  const T squares = sum_of<T>(cols, [=](int64_t j) FASTADAPT_INLINED { return (x[j] - mean) * (x[j] - mean); });
  return {mean, 1 / std::sqrt(squares / cols + T(eps))};
}

template <class T>
FASTADAPT_INLINE void shift_row(T* y, const T* shift, int64_t cols) {
  if (!shift) return;
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) y[j] += shift[j];
}

template <bool kAdd, class From, class T>
FASTADAPT_CPU_VERSIONS void load_rows(const From* from, int64_t row_stride, int64_t col_stride, Matrix<T> to) {
  for (int64_t i = 0; i < to.rows; ++i) {
    const From* x = from + i * row_stride;
    T* y = to.row(i);
    if (col_stride == 1) {
#pragma omp simd
      for (int64_t j = 0; j < to.cols; ++j) y[j] = (kAdd ? y[j] : T(0)) + static_cast<T>(x[j]);
    } else {
      for (int64_t j = 0; j < to.cols; ++j) y[j] = (kAdd ? y[j] : T(0)) + static_cast<T>(x[j * col_stride]);
    }
  }
}

template <class T, class To>
FASTADAPT_CPU_VERSIONS void store_rows(Matrix<T> from, To* to) {
  for (int64_t i = 0; i < from.rows; ++i) {
    const T* x = from.row(i);
    To* y = to + i * from.cols;
#pragma omp simd
    for (int64_t j = 0; j < from.cols; ++j) y[j] = static_cast<To>(x[j]);
  }
}

template <Activation kActivation, class T>
FASTADAPT_CPU_VERSIONS void activate_rows(Matrix<T> z, const T* bias, Matrix<T> r) {
  for (int64_t i = 0; i < z.rows; ++i) {
    T *from = z.row(i), *to = r.row(i);
    shift_row(from, bias, z.cols);
#pragma omp simd
    for (int64_t j = 0; j < z.cols; ++j) to[j] = value<kActivation>(from[j]);
  }
}

template <Activation kActivation, class T>
FASTADAPT_CPU_VERSIONS void slope_rows(Matrix<T> z, Matrix<T> dr, T scale, Matrix<T> dz) {
  for (int64_t i = 0; i < z.rows; ++i) {
    const T *at = z.row(i), *from = dr.row(i);
    T* to = dz.row(i);
#pragma omp simd
    for (int64_t j = 0; j < z.cols; ++j) to[j] = scale * from[j] * slope<kActivation>(at[j]);
  }
}

template <class T>
FASTADAPT_CPU_VERSIONS void normalise_rows(Matrix<T> from, Matrix<T> to, double eps) {
  for (int64_t i = 0; i < from.rows; ++i) {
    const T* x = from.row(i);
    T* y = to.row(i);
    const auto [mean, rstd] = statistics(x, from.cols, eps);
#pragma omp simd
    for (int64_t j = 0; j < from.cols; ++j) y[j] = (x[j] - mean) * rstd;
  }
}

template <class T>
FASTADAPT_CPU_VERSIONS void sum_columns(Matrix<T> from, T scale, T* sums) {
  for (int64_t i = 0; i < from.rows; ++i) {
    const T* x = from.row(i);
#pragma omp simd
    for (int64_t j = 0; j < from.cols; ++j) sums[j] += scale * x[j];
  }
}

template <class T>
FASTADAPT_CPU_VERSIONS void scale_into(Matrix<T> from, T scale, Matrix<T> to) {
  for (int64_t i = 0; i < from.rows; ++i) {
    const T* x = from.row(i);
    T* y = to.row(i);
#pragma omp simd
    for (int64_t j = 0; j < from.cols; ++j) y[j] += scale * x[j];
  }
}

template <class T>
FASTADAPT_CPU_VERSIONS void norm_rows(
    Matrix<T> y, const T* shift, const T* weight, const T* bias, double eps, Matrix<T> to) {
  for (int64_t i = 0; i < y.rows; ++i) {
    T *x = y.row(i), *sum = to.row(i);
    shift_row(x, shift, y.cols);
    const auto [mean, rstd] = statistics(x, y.cols, eps);
#pragma omp simd
    for (int64_t j = 0; j < y.cols; ++j) sum[j] += (x[j] - mean) * rstd * weight[j];
    shift_row(sum, bias, y.cols);
  }
}

template <class T>
FASTADAPT_CPU_VERSIONS void norm_gradient_rows(
    Matrix<T> y, const T* shift, const T* weight, double eps, Matrix<T> dout) {
  for (int64_t i = 0; i < y.rows; ++i) {
    T* x = y.row(i);
    const T* g = dout.row(i);
    shift_row(x, shift, y.cols);
    const auto [mean, rstd] = statistics(x, y.cols, eps);
    T sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t j = 0; j < y.cols; ++j) {
      const T p = g[j] * weight[j];
      sum += p;
      product += p * (x[j] - mean);
    }
    const T level = sum / y.cols, tilt = product * rstd * rstd / y.cols;
#pragma omp simd
    for (int64_t j = 0; j < y.cols; ++j) x[j] = rstd * (g[j] * weight[j] - level - (x[j] - mean) * tilt);
  }
}

template <class T>
FASTADAPT_CPU_VERSIONS void projected_norm_rows(
    Matrix<T> r_rows, Matrix<T> q_rows, Matrix<T> c_rows, int64_t width, T scale, T eps) {
  for (int64_t i = 0; i < r_rows.rows; ++i) {
    T *r = r_rows.row(i), *q = q_rows.row(i), *c = c_rows.row(i);
    T squares = 0, product = 0;
#pragma omp simd reduction(+ : squares, product)
    for (int64_t j = 0; j < r_rows.cols; ++j) {
      squares += q[j] * r[j];
      product += c[j] * r[j];
    }
    const T rstd = 1 / std::sqrt(std::max(squares, T(0)) * scale * scale / width + eps);
    const T lean = scale * scale * rstd * rstd * product / width;
#pragma omp simd
    for (int64_t j = 0; j < r_rows.cols; ++j) {
      c[j] = scale * rstd * (c[j] - lean * q[j]);
      q[j] = lean * r[j];
      r[j] *= rstd;
    }
  }
}

// body(an element of the type that the code stands for).
template <class F>
void with_type(ScalarType dtype, const F& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  }
}

// body(the activation as a constant).
template <class F>
void with_activation(Activation activation, const F& body) {
  switch (activation) {
    case Activation::kIdentity:
      return body(std::integral_constant<Activation, Activation::kIdentity>{});
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kQuickGelu:
      return body(std::integral_constant<Activation, Activation::kQuickGelu>{});
  }
}

}  // namespace

template <class T>
void load(const void* from, ScalarType dtype, int64_t row_stride, int64_t col_stride, Matrix<T> to, bool add) {
  with_type(dtype, [&](auto element) {
    const auto* typed = static_cast<const decltype(element)*>(from);
    add ? load_rows<true>(typed, row_stride, col_stride, to) : load_rows<false>(typed, row_stride, col_stride, to);
  });
}

template <class T>
void store(Matrix<T> from, void* to, ScalarType dtype) {
  with_type(dtype, [&](auto element) { store_rows(from, static_cast<decltype(element)*>(to)); });
}

template <class T>
void fill_rows(Matrix<T> to, const T* vector) {
  for (int64_t i = 0; i < to.rows; ++i) {
    vector ? std::copy_n(vector, to.cols, to.row(i)) : std::fill_n(to.row(i), to.cols, T(0));
  }
}

template <class T>
void normalise(Matrix<T> from, Matrix<T> to, double eps) {
  normalise_rows(from, to, eps);
}

template <class T>
void activate(Activation activation, Matrix<T> z, const T* bias, Matrix<T> r) {
  with_activation(activation, [&](auto chosen) { activate_rows<chosen()>(z, bias, r); });
}

template <class T>
void through_activation(Activation activation, Matrix<T> z, Matrix<T> dr, double scale, Matrix<T> dz) {
  with_activation(activation, [&](auto chosen) { slope_rows<chosen()>(z, dr, static_cast<T>(scale), dz); });
}

template <class T>
void add_column_sums(Matrix<T> from, double scale, T* sums) {
  sum_columns(from, static_cast<T>(scale), sums);
}

template <class T>
void add_scaled(Matrix<T> from, double scale, Matrix<T> to) {
  scale_into(from, static_cast<T>(scale), to);
}

template <class T>
void scale_rows(Matrix<T> from, const T* vector, Matrix<T> to) {
  for (int64_t i = 0; i < from.rows; ++i) {
    const T *x = from.row(i), factor = vector[i];
    T* y = to.row(i);
#pragma omp simd
    for (int64_t j = 0; j < from.cols; ++j) y[j] = factor * x[j];
  }
}

template <class T>
void centre(Matrix<T> matrix) {
  std::vector<T> mean(matrix.cols, 0);
  sum_columns(matrix, T(1) / matrix.rows, mean.data());
  for (int64_t i = 0; i < matrix.rows; ++i) {
    add_scaled<T>({mean.data(), 1, matrix.cols, matrix.cols}, -1, matrix.rows_from(i, 1));
  }
}

template <class T>
void add_normalised(Matrix<T> y, const T* shift, const T* weight, const T* bias, double eps, Matrix<T> to) {
  norm_rows(y, shift, weight, bias, eps, to);
}

template <class T>
void through_norm(Matrix<T> y, const T* shift, const T* weight, double eps, Matrix<T> dout) {
  norm_gradient_rows(y, shift, weight, eps, dout);
}

template <class T>
void through_projected_norm(Matrix<T> r, Matrix<T> q, Matrix<T> c, int64_t width, double scale, double eps) {
  projected_norm_rows(r, q, c, width, static_cast<T>(scale), static_cast<T>(eps));
}

#define FASTADAPT_FOR(T)                                                                                    \
  template void load(const void*, ScalarType, int64_t, int64_t, Matrix<T>, bool);                              \
  template void store(Matrix<T>, void*, ScalarType);                                                           \
  template void fill_rows(Matrix<T>, const T*);                                                             \
  template void normalise(Matrix<T>, Matrix<T>, double);                                                    \
  template void activate(Activation, Matrix<T>, const T*, Matrix<T>);                                       \
  template void through_activation(Activation, Matrix<T>, Matrix<T>, double, Matrix<T>);                    \
  template void add_column_sums(Matrix<T>, double, T*);                                                     \
  template void add_scaled(Matrix<T>, double, Matrix<T>);                                                   \
  template void scale_rows(Matrix<T>, const T*, Matrix<T>);                                                 \
  template void centre(Matrix<T>);                                                                          \
  template void add_normalised(Matrix<T>, const T*, const T*, const T*, double, Matrix<T>);                 \
  template void through_norm(Matrix<T>, const T*, const T*, double, Matrix<T>);                             \
  template void through_projected_norm(Matrix<T>, Matrix<T>, Matrix<T>, int64_t, double, double)

FASTADAPT_FOR(float);
FASTADAPT_FOR(double);

}  // namespace fastadapt
