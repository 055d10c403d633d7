// Texts of errors, put together without streams. Where the compiler links its own libstdc++ into the
// extension (a toolchain that has only the static one), a stream finds no locale beside torch's libstdc++,
// and ends the process.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Layout.h>
#include <c10/util/ArrayRef.h>

#include <concepts>
#include <string>

namespace d4s {

inline void append(std::string& text, const char* part) { text += part; }
inline void append(std::string& text, const std::string& part) { text += part; }
inline void append(std::string& text, std::integral auto number) { text += std::to_string(number); }
inline void append(std::string& text, const c10::Device& device) { text += device.str(); }

// "[2, 3]"
inline void append(std::string& text, c10::ArrayRef<int64_t> sizes) {
  text += '[';
  for (size_t i = 0; i < sizes.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  text += ']';
}

inline const char* name_of(c10::Layout layout) {
  switch (layout) {
    case c10::Layout::Strided:
      return "strided";
    case c10::Layout::Sparse:
      return "sparse";
    case c10::Layout::SparseCsr:
      return "sparse_csr";
    case c10::Layout::SparseCsc:
      return "sparse_csc";
    case c10::Layout::SparseBsr:
      return "sparse_bsr";
    case c10::Layout::SparseBsc:
      return "sparse_bsc";
    case c10::Layout::Mkldnn:
      return "mkldnn";
    default:
      return "jagged";
  }
}

// All parts, one behind another.
template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

}  // namespace d4s
