// Arena: hands out aligned pieces of the caller's workspace, or only counts them. A size query and
// the call itself run the same layout code, so the two cannot drift apart.
#ifndef FLEXPREFILL_SRC_ARENA_H_
#define FLEXPREFILL_SRC_ARENA_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "flexprefill/types.h"

namespace flexprefill {

class Arena {
 public:
  static constexpr size_t kAlignment = 64;

  Arena() = default;  // counts
  explicit Arena(Workspace workspace) : counting_(false), end_(workspace.bytes) {
    const auto address = reinterpret_cast<uintptr_t>(workspace.data);
    base_ = static_cast<std::byte*>(workspace.data);
    used_ = (kAlignment - address % kAlignment) % kAlignment;
  }

  bool counting() const { return counting_; }
  // The caller's memory; nullptr when counting.
  const void* base() const { return base_; }
  // Bytes a workspace of any alignment must have for what was taken.
  size_t bytes() const { return used_ == 0 ? 0 : used_ + kAlignment; }

  [[noreturn]] static void refuse(size_t expected, size_t got) {
    throw Error(ErrorCode::kWorkspaceTooSmall,
                "workspace: expected at least " + std::to_string(expected) + " bytes, got " +
                    std::to_string(got) + " (ask the *_workspace_size function)");
  }

  // n elements, aligned to 64 bytes, uninitialised; nullptr when counting.
  template <typename T>
  T* take(size_t n) {
    const size_t bytes = (n * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    const size_t offset = used_;
    used_ += bytes;
    if (counting_) return nullptr;
    if (used_ > end_) refuse(used_, end_);
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  bool counting_ = true;
  std::byte* base_ = nullptr;
  size_t used_ = 0;
  size_t end_ = 0;
};

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_ARENA_H_
