// The operators of the extension, declared in one place; each source beside this one implements its own.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastadapt_native, m) {
  m.def("masked(Tensor x, Tensor seed, int threshold, int member) -> Tensor");
  m.def("keep_mask(Tensor seed, int rows, int cols, int threshold, int member) -> Tensor");
  m.def("lora_linear(Tensor?[] tensors, float[] scales, int threshold) -> Tensor[]");
  m.def(
      "lora_linear_backward(Tensor?[] saved, Tensor?[] grads, bool[] needs, float[] scales, int threshold)"
      " -> Tensor[]");
  m.def(
      "side_fusion(Tensor?[] tensors, int base_count, int[] activations, float[] scales, float[] norm_eps,"
      " float[] out_norm_eps) -> Tensor[]");
  m.def(
      "side_fusion_backward(Tensor?[] saved, Tensor?[] grads, bool[] needs, int base_count, int[] activations,"
      " float[] scales, float[] norm_eps, float[] out_norm_eps) -> Tensor[]");
}
