// What the ops throw; bindings.cpp turns each into an error of d4s.errors.
#pragma once

#include <stdexcept>

namespace d4s {

// Becomes D4SError.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Becomes NotPositiveDefiniteError: a matrix has no Cholesky factor, or holds NaN.
struct NotPositiveDefinite : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace d4s
