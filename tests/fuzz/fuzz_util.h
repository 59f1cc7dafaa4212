// What both fuzz targets use: a check that stays in release builds, and seeds for the corpus.
#ifndef FLEXPREFILL_TESTS_FUZZ_FUZZ_UTIL_H_
#define FLEXPREFILL_TESTS_FUZZ_FUZZ_UTIL_H_

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#define FUZZ_EXPECT(condition)                                                                     \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      std::fprintf(stderr, "%s:%d: expected %s; last error: %s\n", __FILE__, __LINE__, #condition, \
                   flexprefill_last_error());                                                      \
      std::abort();                                                                                \
    }                                                                                              \
  } while (0)

namespace flexprefill::fuzz {

// Writes the seeds into the first argument that is a folder, if it is empty.
inline void write_seeds(int argc, char** argv, const std::vector<std::string>& seeds) {
  for (int i = 1; i < argc; ++i) {
    if (!std::filesystem::is_directory(argv[i])) continue;
    if (!std::filesystem::is_empty(argv[i])) return;
    for (size_t s = 0; s < seeds.size(); ++s) {
      std::ofstream file(std::filesystem::path(argv[i]) / ("seed" + std::to_string(s)),
                         std::ios::binary);
      file.write(seeds[s].data(), static_cast<std::streamsize>(seeds[s].size()));
    }
    return;
  }
}

}  // namespace flexprefill::fuzz

#endif  // FLEXPREFILL_TESTS_FUZZ_FUZZ_UTIL_H_
