// Elementwise work on rows of float or double, as vectorised loops: what lies between a kernel's matrix products.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace fastadapt {

// Codes of the activations in the operators' schemas, in the order of reference.ACTIVATIONS.
enum class Activation : int64_t { kIdentity, kRelu, kGelu, kQuickGelu };
constexpr int64_t kActivations = 4;

// A matrix in memory that something else owns.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, row_stride, col_stride = 1;

  T* row(int64_t i) const { return data + i * row_stride; }
  Matrix t() const { return {data, cols, rows, col_stride, row_stride}; }
  Matrix rows_from(int64_t first, int64_t count) const { return {row(first), count, cols, row_stride, col_stride}; }
  Matrix cols_from(int64_t first, int64_t count) const {
    return {data + first * col_stride, rows, count, row_stride, col_stride};
  }
};

// The functions below take matrices whose rows are of adjacent elements, and vectors of a row's length or null.
// T is float or double.

// to = from, or to += from; `from` is memory of a ScalarType with any strides.
template <class T>
void load(
    const void* from, torch::headeronly::ScalarType dtype, int64_t row_stride, int64_t col_stride, Matrix<T> to,
    bool add = false);

// Memory of a ScalarType, row after row, = from.
template <class T>
void store(Matrix<T> from, void* to, torch::headeronly::ScalarType dtype);

// Every row = vector, or 0 for null.
template <class T>
void fill_rows(Matrix<T> to, const T* vector);

// to = rstd (from - mean) of every row; the two may be one.
template <class T>
void normalise(Matrix<T> from, Matrix<T> to, double eps);

// z += bias, r = act(z); the two may be one, which is then r.
template <class T>
void activate(Activation activation, Matrix<T> z, const T* bias, Matrix<T> r);

// dz = scale dr o act'(z); dz and dr may be one.
template <class T>
void through_activation(Activation activation, Matrix<T> z, Matrix<T> dr, double scale, Matrix<T> dz);

// sums += scale times the sum of the rows.
template <class T>
void add_column_sums(Matrix<T> from, double scale, T* sums);

// to += scale from.
template <class T>
void add_scaled(Matrix<T> from, double scale, Matrix<T> to);

// Row i of to = vector[i] times that of from; the two may be one.
template <class T>
void scale_rows(Matrix<T> from, const T* vector, Matrix<T> to);

// Every column less its mean.
template <class T>
void centre(Matrix<T> matrix);

// to += LayerNorm(y + shift).
template <class T>
void add_normalised(Matrix<T> y, const T* shift, const T* weight, const T* bias, double eps, Matrix<T> to);

// The gradient of y, in y's place, from that of LayerNorm(y + shift).
template <class T>
void through_norm(Matrix<T> y, const T* shift, const T* weight, double eps, Matrix<T> dout);

// For y = scale r W^T of `width` columns that sum to 0 in W, q = r W^T W and c = dout (gamma o W), both of r's columns:
// with lean = scale^2 rstd^2 c.r / width of every row, from rstd of LayerNorm(y),
//     c = scale rstd (c - lean q), which is scale dy W,    q = lean r,    r = rstd r
// and dy^T = gamma o dout^T r - W r^T q without what gamma o dout^T r leaves as the mean of its rows.
template <class T>
void through_projected_norm(Matrix<T> r, Matrix<T> q, Matrix<T> c, int64_t width, double scale, double eps);

}  // namespace fastadapt
