// Groups of M consecutive weights in the order (O, KH, KW, I), and packed masks in that order.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace tersor::sparsity {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t BLOCK = 4096;  // groups that one task takes; their bits end at a byte's border
constexpr int MOST = 16;         // positions of a group

// Which combinations the scores of a group are: all of them, or those whose numbers lie beside the scores.
struct Stored {
  const uint16_t* patterns;  // [combinations]: the positions that each keeps
  int combinations;          // of n and m
  int count;                 // of which a group has scores
  const uint8_t* narrow;     // [groups][count]: up to 256 combinations; else null
  const int16_t* wide;       // more; null as well where a group has scores of all

  bool all() const { return narrow == nullptr && wide == nullptr; }

  // The positions that each of a group's keeps; false if a number is none of a combination, whose positions are none.
  template <class W>
  bool read(int64_t group, W* rows) const {
    return narrow ? read_from(narrow + group * count, rows) : read_from(wide + group * count, rows);
  }

 private:
  template <class I, class W>
  bool read_from(const I* numbers, W* rows) const {
    bool good = true;
    for (int j = 0; j < count; ++j) {
      const bool valid = static_cast<uint16_t>(numbers[j]) < combinations;  // as negative ones are not
      rows[j] = valid ? patterns[static_cast<uint16_t>(numbers[j])] : 0, good = good && valid;
    }
    return good;
  }
};

struct Task {
  const void* weight;
  const void* grad_output;
  const void* scores;
  const uint8_t* given_mask;  // or null: from the scores
  void* output;               // forward: the sparse weight; backward: the weight's gradient
  void* grad_scores;
  uint8_t* mask;
  int64_t groups;
  int n, m;
  Stored stored;
  std::atomic<bool>* invalid;  // set if a number is none of a combination
  const void* table;           // [m][padded combinations] of 0 and 1
  int padded;
  double decay;
  const int32_t* places;  // [filter]: where an element of a filter lies in memory; null where in order
  int64_t filter;         // elements of a filter
};

// Of one rule, type and instruction set, over groups from `first` to `end`.
struct Kernels {
  void (*forward)(const Task&, int64_t first, int64_t end);
  void (*backward)(const Task&, int64_t first, int64_t end);
};

// Where the elements lie, one after the other.
class Walk {
 public:
  Walk(const Task& task, int64_t element)
      : places_(task.places), filter_(task.filter), place_(task.places ? element % task.filter : 0),
        base_(task.places ? element - place_ : element) {}

  int64_t next() {
    if (places_ == nullptr) return base_++;
    const int64_t at = base_ + places_[place_];
    if (++place_ == filter_) place_ = 0, base_ += filter_;
    return at;
  }

 private:
  const int32_t* places_;
  const int64_t filter_;
  int64_t place_, base_;
};

// Bits of one group after the other, from a byte's border on.
class BitReader {
 public:
  BitReader(const uint8_t* bytes, int64_t first_bit) : bytes_(bytes + first_bit / 8) {}

  uint32_t next(int count) {
    while (held_ < count) word_ |= static_cast<uint32_t>(*bytes_++) << held_, held_ += 8;
    const uint32_t bits = word_ & ((1u << count) - 1);
    word_ >>= count, held_ -= count;
    return bits;
  }

 private:
  const uint8_t* bytes_;
  uint32_t word_ = 0;
  int held_ = 0;
};

class BitWriter {
 public:
  BitWriter(uint8_t* bytes, int64_t first_bit) : bytes_(bytes + first_bit / 8) {}
  ~BitWriter() {
    if (held_ > 0) *bytes_ = static_cast<uint8_t>(word_);
  }

  void put(uint32_t bits, int count) {
    word_ |= bits << held_, held_ += count;
    for (; held_ >= 8; held_ -= 8, word_ >>= 8) *bytes_++ = static_cast<uint8_t>(word_);
  }

 private:
  uint8_t* bytes_;
  uint32_t word_ = 0;
  int held_ = 0;
};

// The table of combinations in both of its forms.
struct Patterns {
  std::vector<uint16_t> rows;
  std::vector<float> single;
  std::vector<double> twice;
  int padded;

  Patterns(int n, int m) {
    for (uint32_t kept = 0; kept < 1u << m; ++kept) {
      if (__builtin_popcount(kept) == n) rows.push_back(static_cast<uint16_t>(kept));
    }
    // Lexicographic in the positions kept: the one that keeps an earlier position comes first.
    std::sort(rows.begin(), rows.end(), [](uint16_t a, uint16_t b) {
      const uint32_t differ = a ^ b, lowest = differ & -differ;
      return (a & lowest) != 0 && a != b;
    });
    padded = static_cast<int>((rows.size() + 15) / 16 * 16);
    single.assign(static_cast<size_t>(m) * padded, 0.0f), twice.assign(single.size(), 0.0);
    for (size_t j = 0; j < rows.size(); ++j) {
      for (int p = 0; p < m; ++p) single[p * padded + j] = rows[j] >> p & 1, twice[p * padded + j] = single[p * padded + j];
    }
  }
};

// What a group has scores of; holds the numbers while a kernel reads them.
class Numbers {
 public:
  Numbers(const std::optional<Tensor>& given, const Tensor& scores, const Patterns& patterns) {
    stored.patterns = patterns.rows.data(), stored.combinations = static_cast<int>(patterns.rows.size());
    STD_TORCH_CHECK(scores.is_cpu() && scores.dim() == 2 && scores.size(1) <= stored.combinations &&
                        (given ? scores.size(1) >= 1 : scores.size(1) == stored.combinations),
                    "scores must be a CPU tensor (groups, combinations)");
    stored.count = static_cast<int>(scores.size(1));
    if (!given) return;
    const bool narrow = stored.combinations <= 256;
    STD_TORCH_CHECK(given->is_cpu() && given->scalar_type() == (narrow ? ScalarType::Byte : ScalarType::Short) &&
                        given->dim() == 2 && given->size(0) == scores.size(0) && given->size(1) == scores.size(1),
                    "combinations must be a CPU tensor of the shape of scores, uint8 for up to 256 of them, else int16");
    tensor_ = torch::stable::contiguous(*given);
    if (narrow) stored.narrow = static_cast<const uint8_t*>(tensor_->const_data_ptr());
    else stored.wide = static_cast<const int16_t*>(tensor_->const_data_ptr());
  }

  void check() const {
    STD_TORCH_CHECK(!invalid, "combinations must be from 0 to ", stored.combinations - 1, ", got one that is not");
  }

  Stored stored{};
  std::atomic<bool> invalid{false};

 private:
  std::optional<Tensor> tensor_;
};

inline void check_pattern(int64_t n, int64_t m) {
  STD_TORCH_CHECK(n >= 1 && n < m && m <= MOST, "n and m must satisfy 1 <= n < m <= 16");
}

inline void check_mask(const Tensor& mask, int64_t elements) {
  STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Byte && mask.numel() == (elements + 7) / 8,
                  "mask must be a uint8 CPU tensor of one bit per weight");
}

// A weight whose elements lie without gaps, in order or channel by channel; fills in where they lie.
class Weight {
 public:
  Weight(const Tensor& given, int64_t m, Task& task) : tensor(given) {
    STD_TORCH_CHECK(given.is_cpu() && (given.dim() == 2 || given.dim() == 4), "weight must be a CPU tensor (O, I[, KH, KW])");
    STD_TORCH_CHECK(given.numel() % m == 0, "m must divide the elements of the weight");
    if (!in_group_order(given)) tensor = torch::stable::contiguous(given);
    task.groups = given.numel() / m;
    if (given.dim() != 4 || in_group_order(tensor)) return;
    const int64_t inputs = given.size(1), taps = given.size(2) * given.size(3);
    task.filter = inputs * taps;
    places_.resize(task.filter);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t i = 0; i < inputs; ++i) places_[tap * inputs + i] = static_cast<int32_t>(i * taps + tap);
    }
    task.places = places_.data();
  }

  // Another tensor of the weight's shape, in the same order of memory.
  Tensor like(const Tensor& other) const {
    STD_TORCH_CHECK(other.is_cpu() && other.scalar_type() == tensor.scalar_type() && other.dim() == tensor.dim() &&
                        other.numel() == tensor.numel(),
                    "grad_output must have the shape and dtype of weight");
    bool same = true;
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      STD_TORCH_CHECK(other.size(i) == tensor.size(i), "grad_output must have the shape of weight");
      same = same && (tensor.size(i) == 1 || other.stride(i) == tensor.stride(i));
    }
    if (same) return other;
    Tensor copy = torch::stable::empty_like(tensor);
    torch::stable::copy_(copy, other);
    return copy;
  }

  Tensor tensor;

 private:
  static bool in_group_order(const Tensor& t) {
    if (t.dim() == 2) return t.is_contiguous();
    const int64_t order[] = {1, 3, 2, 0};
    int64_t next = 1;
    for (const int64_t dim : order) {
      if (t.size(dim) != 1 && t.stride(dim) != next) return false;
      next *= t.size(dim);
    }
    return true;
  }

  std::vector<int32_t> places_;
};

template <class F>
void for_groups(int64_t groups, const F& body) {
  torch::stable::parallel_for(0, (groups + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b * BLOCK, std::min(groups, (b + 1) * BLOCK));
  });
}

}  // namespace tersor::sparsity
