// The summed absolute error of a linear model, sum |w x - y| over rows, by threads that share the sum in four ways.
//
// Rows lie in groups of 64, feature by feature, so that a vector register holds neighbouring rows of a feature and memory
// is read from one end to the other: x is [groups, features, 64], w [features], y [groups, 64], all fp32 and filled up
// with zeros. Rows are multiplied in fp32 and summed in fp64. The ways differ only in how rows become one sum.

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kGroup = 64;           // rows, which four AVX-512 registers hold
constexpr int64_t kBlock = 64 * kGroup;  // rows of one partial sum

struct Rows {
  const float *x, *w, *y;
  int64_t features, groups;

  Rows(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y)
      : x(x.const_data_ptr<float>()), w(w.const_data_ptr<float>()), y(y.const_data_ptr<float>()),
        features(w.numel()), groups(y.numel() / kGroup) {
    TORCH_CHECK(x.is_contiguous() && w.is_contiguous() && y.is_contiguous(), "x, w and y must be contiguous");
    TORCH_CHECK(y.numel() % kGroup == 0 && x.numel() == features * y.numel(),
                "x [groups, features, 64], w [features] and y [groups, 64] do not fit together");
  }

  int64_t blocks() const { return (groups * kGroup + kBlock - 1) / kBlock; }

  // use(errors[64]) for each group of one block.
  template <typename Use>
  void each_group(int64_t block, Use use) const {
    const int64_t first = block * (kBlock / kGroup), last = std::min(first + kBlock / kGroup, groups);
    for (int64_t group = first; group < last; ++group) {
      float errors[kGroup];
      for (int i = 0; i < kGroup; ++i) errors[i] = -y[group * kGroup + i];
      for (int64_t f = 0; f < features; ++f)
        for (int i = 0; i < kGroup; ++i) errors[i] += w[f] * x[(group * features + f) * kGroup + i];
      for (int i = 0; i < kGroup; ++i) errors[i] = std::fabs(errors[i]);
      use(errors);
    }
  }

  // Row i of each group is added to lane i, group by group, then lane by lane.
  double block_sum(int64_t block) const {
    double lanes[kGroup] = {}, sum = 0;
    each_group(block, [&](const float* errors) {
      for (int i = 0; i < kGroup; ++i) lanes[i] += errors[i];
    });
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

// work(first, last) on each thread, for its even share of `count` things; returns when all have ended.
template <typename Work>
void on_threads(int64_t threads, int64_t count, Work work) {
  struct Joined : std::vector<std::thread> {
    ~Joined() {
      for (auto& thread : *this) thread.join();
    }
  } started;
  for (int64_t t = 0; t < threads; ++t) started.emplace_back(work, count * t / threads, count * (t + 1) / threads);
}

// One thread, nothing shared: the sums of blocks in the order of blocks.
double serial(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y, int64_t) {
  const Rows rows(x, w, y);
  double sum = 0;
  for (int64_t block = 0; block < rows.blocks(); ++block) sum += rows.block_sum(block);
  return sum;
}

// Wrong on purpose: what another thread stores between this load and this store is lost. An atomic, because a race on a
// plain double is undefined behaviour, which may crash or be optimised into a sum per thread; but no fetch_add.
double unprotected(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y, int64_t threads) {
  const Rows rows(x, w, y);
  std::atomic<double> sum{0};
  on_threads(threads, rows.blocks(), [&](int64_t block, int64_t last) {
    for (; block < last; ++block)
      rows.each_group(block, [&](const float* errors) {
        for (int i = 0; i < kGroup; ++i)
          sum.store(sum.load(std::memory_order_relaxed) + errors[i], std::memory_order_relaxed);
      });
  });
  return sum;
}

// The lock is taken for every row, by threads in any order. Sums of doubles depend on the order, so this one is of whole
// multiples of 2^-32: each error below 2^31 fits 64 bits, and their sum 128.
double locked(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y, int64_t threads) {
  const Rows rows(x, w, y);
  std::mutex mutex;
  __int128 sum = 0;
  on_threads(threads, rows.blocks(), [&](int64_t block, int64_t last) {
    for (; block < last; ++block)
      rows.each_group(block, [&](const float* errors) {
        for (int i = 0; i < kGroup; ++i) {
          const int64_t units = std::llrint(errors[i] * 0x1p32);
          const std::lock_guard<std::mutex> lock(mutex);
          sum += units;
        }
      });
  });
  return static_cast<double>(sum) * 0x1p-32;
}

// Each thread sums blocks of its own; they are added in the order of blocks, as serial() does, whoever made them.
double partial(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y, int64_t threads) {
  const Rows rows(x, w, y);
  std::vector<double> sums(rows.blocks());
  on_threads(threads, rows.blocks(), [&](int64_t block, int64_t last) {
    for (; block < last; ++block) sums[block] = rows.block_sum(block);
  });
  double sum = 0;
  for (double one : sums) sum += one;
  return sum;
}

// STREAM's Copy. Pieces as large as a thread's share memcpy stores past the caches (glibc does from about the size of the
// last-level cache on); a store through them first reads the line, half as much again as the bytes that one counts.
void copy(const at::Tensor& to, const at::Tensor& from, int64_t threads) {
  TORCH_CHECK(to.is_contiguous() && from.is_contiguous() && to.nbytes() == from.nbytes(), "copies differ in size");
  char* target = static_cast<char*>(to.mutable_data_ptr());
  const char* source = static_cast<const char*>(from.const_data_ptr());
  on_threads(threads, to.nbytes(), [&](int64_t first, int64_t last) {
    std::memcpy(target + first, source + first, last - first);
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("serial", &serial, no_gil);
  m.def("unprotected", &unprotected, no_gil);
  m.def("mutex", &locked, no_gil);
  m.def("partial", &partial, no_gil);
  m.def("copy", &copy, no_gil);
}
