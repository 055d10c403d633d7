// What the ops ask of their arguments. The one door for tensors is check_tensor: past it a tensor's elements
// lie in memory, where its strides say, and are of a type that the ops know.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "errors.h"
#include "matrix.h"
#include "text.h"

namespace d4s {

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) throw ArgumentError(text_of(parts...));
}

// "float32": the name of a type in Python.
inline std::string name_of(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

using Types = c10::ArrayRef<at::ScalarType>;
inline constexpr at::ScalarType kFloating[] = {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16};
inline constexpr at::ScalarType kWide[] = {at::kDouble, at::kFloat};  // of sums
inline constexpr at::ScalarType kBoolean[] = {at::kBool};

inline std::string names_of(Types types) {
  std::string names;
  for (size_t i = 0; i < types.size(); ++i) {
    if (i > 0) names += i + 1 < types.size() ? ", " : " or ";
    names += name_of(types[i]);
  }
  return names;
}

// Of a strided tensor of one element or more: where its elements begin and end in memory.
struct Bytes {
  const char* begin;
  const char* end;
};
inline Bytes bytes_of(const at::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const char* const begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

// `tensor` is of one of the types and its elements lie in memory of the CPU or of a CUDA device. Says what
// else it is: sparse, packed, nested, quantised, without memory, or a wrapper of something.
inline void check_tensor(const at::Tensor& tensor, const char* name, Types types) {
  const char* const wanted = "; it must be a plain tensor in memory";
  check(tensor.defined(), name, " is undefined", wanted);
  // The keys that are let in, not those that are not: what torch adds later is refused, too.
  static const uint64_t plain =
      (c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::ADInplaceOrView,
                            c10::DispatchKey::AutogradFunctionality, c10::DispatchKey::Negative,
                            c10::DispatchKey::Conjugate}) |
       c10::DispatchKeySet({c10::BackendComponent::CPUBit, c10::BackendComponent::CUDABit}) |
       c10::autocast_dispatch_keyset)
          .raw_repr();
  const c10::DispatchKeySet keys = tensor.key_set();
  check(!tensor.is_nested(), name, " is a nested tensor", wanted);
  check(!keys.has(c10::DispatchKey::Python), name,
        " is a tensor subclass that computes in Python (fake, distributed, quantised, ...)", wanted);
  check(!keys.has(c10::DispatchKey::FuncTorchBatched) && !keys.has(c10::DispatchKey::FuncTorchGradWrapper) &&
            !keys.has(c10::DispatchKey::Functionalize),
        name, " is a tensor that torch.func follows (vmap, grad, functionalize, ...)", wanted);
  check(tensor.layout() == at::kStrided, name, " has the layout ", name_of(tensor.layout()), "; pass ", name,
        ".to_dense()");
  check(tensor.is_cpu() || tensor.is_cuda(), name, " is on ", tensor.device(), "; it must be on cpu or cuda");
  bool known = false;
  for (const at::ScalarType type : types) known |= tensor.scalar_type() == type;
  check(known, name, " is ", name_of(tensor.scalar_type()), "; it must be ", names_of(types));
  check((keys.raw_repr() & ~plain) == 0 && tensor.has_storage(), name, " is a tensor of ",
        c10::toString(keys), wanted);
  if (tensor.numel() == 0) return;
  const Bytes bytes = bytes_of(tensor);
  const char* const storage = static_cast<const char*>(tensor.storage().data());
  check(storage && bytes.end <= storage + tensor.storage().nbytes(), name,
        " is larger than its storage, whose memory was freed or resized", wanted);
  check(reinterpret_cast<uintptr_t>(bytes.begin) % tensor.element_size() == 0, name,
        " begins in memory at no multiple of its element's size; pass ", name, ".clone()");
}

// The type of a tensor that check_tensor has let in as kFloating.
inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::float64;
    case at::kFloat:
      return DType::float32;
    case at::kHalf:
      return DType::float16;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      throw std::logic_error("a type that check_tensor does not let in");
  }
}

// The memory of a matrix that check_tensor has let in as kFloating.
inline Matrix matrix_of(const at::Tensor& tensor) {
  return {tensor.data_ptr(), dtype_of(tensor), tensor.size(0),
          tensor.size(1),    tensor.stride(0), tensor.stride(1)};
}

inline void check_device(const at::Tensor& first, const at::Tensor& other, const char* name) {
  check(first.device() == other.device(), name, " is on ", other.device(), ", the others on ",
        first.device());
}

inline void check_square(const at::Tensor& matrix, const char* name) {
  check_tensor(matrix, name, kWide);
  check(matrix.dim() == 2 && matrix.size(0) == matrix.size(1), name, " has shape ", matrix.sizes(),
        "; it must be [d, d]");
  check(matrix.is_contiguous(), name, " must be contiguous");
}

// `written` must not share memory with what is read meanwhile, unless they are the same elements and
// `same_is_right`. Addresses are compared, not storages: two storages may lie over one memory.
inline void check_apart(const at::Tensor& written, const char* written_name, const at::Tensor& read,
                        const char* name, bool same_is_right = false) {
  if (written.numel() == 0 || read.numel() == 0) return;
  const Bytes to = bytes_of(written), from = bytes_of(read);
  const bool apart = from.end <= to.begin || to.end <= from.begin;
  const bool same =
      from.begin == to.begin && written.sizes() == read.sizes() && written.strides() == read.strides();
  check(apart || (same_is_right && same), name, " shares memory with ", written_name,
        ", which is written while ", name, " is read; pass a clone");
}

// A tensor about to be written: autograd must know, and its elements must be what lies in memory.
inline void count_write(const at::Tensor& written, const char* name) {
  check(!written.is_neg(), name, " is a lazily negated view; pass ", name, ".resolve_neg()");
  if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
}

// While it lives, torch computes on memory: nothing for autograd, and no mode (a fake tensor's, torch.func's)
// puts a tensor of its own in the place of the ops' scratch and results.
struct OnMemory {
  at::NoGradGuard no_grad;
  c10::impl::ForceDispatchKeyGuard no_mode{
      c10::impl::tls_local_dispatch_key_set().included_ & c10::default_included_set,
      c10::impl::tls_local_dispatch_key_set().excluded_};
};

}  // namespace d4s
