// side_fusion's CUDA kernels on the CPU: reads a call from a file, runs it forward and backward, writes out and the gradients.
//
//     run_side_fusion CALL RESULT
//
// The call is 64-bit integers, doubles and tensors (their bytes, after how many there are; -1 for none) in the order they are
// read below, as tests/cuda/emulation.py writes them.  Every tensor has memory of exactly its size.
#include <fstream>
#include <memory>
#include <vector>

#include "side_fusion_launch.cuh"

using namespace fastadapt;
using namespace fastadapt::side_fusion;

namespace {

class File {
 public:
  explicit File(const char* name) : stream_(name, std::ios::binary) {
    stream_.exceptions(std::ios::failbit | std::ios::badbit);
  }
  template <class V = int64_t>
  V number() {
    V number;
    stream_.read(reinterpret_cast<char*>(&number), sizeof number);
    return number;
  }
  // A tensor's memory, which lives as long as this; null for none.
  void* tensor() {
    const int64_t bytes = number();
    if (bytes < 0) return nullptr;
    char* memory = allocate(bytes);
    stream_.read(memory, bytes);
    return memory;
  }
  char* allocate(int64_t bytes) {
    memory_.push_back(std::make_unique_for_overwrite<char[]>(bytes));
    std::memset(memory_.back().get(), 0xff, bytes);  // a NaN, whichever the type
    return memory_.back().get();
  }

 private:
  std::ifstream stream_;
  std::vector<std::unique_ptr<char[]>> memory_;
};

struct Launch {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, size_t shared, const Arguments&... arguments) const {
    emulated::launch(kernel, grid, kThreads, shared, arguments...);
  }
};

template <class T>
void run(File& file, std::ofstream& result) {
  Call call{};
  Products products{};
  void* grads[kMaxAdapters][kEach] = {};
  int64_t sizes[kMaxAdapters][kEach] = {};
  call.rows = file.number();
  call.outputs = static_cast<int>(file.number());
  call.base_count = static_cast<int>(file.number());
  for (int b = 0; b < call.base_count; ++b) {
    call.wide_bases |= static_cast<unsigned>(file.number()) << b;
    call.bases[b] = file.tensor();
  }
  call.wide_out = file.number();
  call.dout = file.tensor();
  call.count = static_cast<int>(file.number());
  for (int i = 0; i < call.count; ++i) {
    Adapter& adapter = call.adapters[i];
    for (int* one : {&adapter.inputs, &adapter.hidden, &adapter.own, &adapter.shared, &adapter.activation}) {
      *one = static_cast<int>(file.number());
    }
    for (float* one : {&adapter.scale, &adapter.norm_eps, &adapter.out_eps}) *one = static_cast<float>(file.number<double>());
    for (int t = 0; t < kEach; ++t) {
      adapter.wide |= static_cast<unsigned>(file.number()) << t;
      sizes[i][t] = file.number();  // bytes of its gradient, 0 where none is wanted
      if (sizes[i][t] > 0) grads[i][t] = file.allocate(sizes[i][t]);
      adapter.tensors[t] = file.tensor();
    }
  }
  plan(call);

  const int64_t out_bytes = call.rows * call.outputs * (call.wide_out ? 4 : 2);
  Call forward_call = call;
  forward_call.dout = nullptr;
  forward_call.out = file.allocate(out_bytes);
  place_forward(forward_call, file.allocate(place_forward(forward_call, nullptr)));
  forward<T>(forward_call, Launch{});
  result.write(static_cast<const char*>(forward_call.out), out_bytes);

  place_backward(call, products, grads, file.allocate(place_backward(call, products, grads, nullptr)));
  backward<T>(call, products, Launch{});
  for (int i = 0; i < call.count; ++i) {
    for (int t = 0; t < kEach; ++t) result.write(static_cast<const char*>(grads[i][t]), sizes[i][t]);
  }
}

}  // namespace

int main(int, char** arguments) {
  File file(arguments[1]);
  std::ofstream result(arguments[2], std::ios::binary);
  if (file.number()) {
    run<Half>(file, result);
  } else {
    run<Bfloat>(file, result);
  }
}
