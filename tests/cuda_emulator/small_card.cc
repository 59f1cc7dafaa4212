// Linked into a test: the emulated device is a card with little shared memory.
#include "cuda_emulator/emulator.h"

namespace {

const bool kIsSmall = [] {
  cuda_emulator::settings().major = 8;
  cuda_emulator::settings().minor = 6;
  return true;
}();

}  // namespace
