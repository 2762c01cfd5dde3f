// Python's view of what is not an operator: how the library was built and which instruction set it uses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "isa.h"

namespace py = pybind11;
using namespace tersor;

namespace {

std::vector<std::string> supported() {
  std::vector<std::string> levels;
  for (int level = 0; level <= static_cast<int>(cpu_isa_best()); ++level) {
    levels.emplace_back(isa_name(static_cast<Isa>(level)));
  }
  return levels;
}

void set(const std::string& name) {
  const auto levels = supported();
  std::string allowed;
  for (std::size_t level = 0; level < levels.size(); ++level) {
    if (levels[level] == name) {
      set_cpu_isa(static_cast<Isa>(level));
      return;
    }
    allowed += (level ? ", " : "") + levels[level];
  }
  throw py::value_error("set_cpu_isa: level must be one of " + allowed + " on this processor, got '" + name + "'");
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "How tersor's C++ library was built, and the instruction set that it uses.";
  module.def("cpu_isa", [] { return isa_name(cpu_isa()); }, "The level in use.");
  module.def("cpu_isa_supported", &supported, "The levels that this processor runs, lowest first.");
  module.def("set_cpu_isa", &set, py::arg("level"), "Chooses a level for the whole process.");
  module.def("compiler", &compiler, "The compiler and its version.");
}
