// The window that slides over an image, as the convolutions' tasks hold it.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace tersor {

constexpr int64_t MOST_WINDOW = int64_t{1} << 20;  // of a stride, padding or dilation: products stay within 64 bits

inline void check_window(const std::vector<int64_t>& pair, int64_t least, const char* name) {
  STD_TORCH_CHECK(pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= MOST_WINDOW,
                  name, " must be two numbers from ", least, " to ", MOST_WINDOW);
}

// Fills in the window and the output's sizes, from the input's and the kernel's.
template <class Task>
void set_window(Task& task, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation) {
  check_window(stride, 1, "stride"), check_window(padding, 0, "padding"), check_window(dilation, 1, "dilation");
  task.stride_h = stride[0], task.stride_w = stride[1], task.padding_h = padding[0], task.padding_w = padding[1];
  task.dilation_h = dilation[0], task.dilation_w = dilation[1];
  task.out_height = task.height + 2 * task.padding_h - task.dilation_h * (task.kernel_h - 1) - 1;
  task.out_width = task.width + 2 * task.padding_w - task.dilation_w * (task.kernel_w - 1) - 1;
  STD_TORCH_CHECK(task.out_height >= 0 && task.out_width >= 0, "input must be at least as large as the window");
  task.out_height = task.out_height / task.stride_h + 1, task.out_width = task.out_width / task.stride_w + 1;
  // Of a single output row, and of a single tap, any will do; large ones would take memory.
  if (task.out_height == 1) task.stride_h = 1;
  if (task.out_width == 1) task.stride_w = 1;
  if (task.kernel_h == 1) task.dilation_h = 1;
  if (task.kernel_w == 1) task.dilation_w = 1;
}

}  // namespace tersor
