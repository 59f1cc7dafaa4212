// Reads the arrays of an .npz file (a zip archive of .npy files, stored or deflated), so that the
// C++ tests need neither Python nor zlib. Little-endian hosts; throws on anything unexpected.
#ifndef FLEXPREFILL_TESTS_NPZ_H_
#define FLEXPREFILL_TESTS_NPZ_H_

#include <array>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace flexprefill::testing {

struct NpyArray {
  std::string dtype;  // NumPy's, such as "<i2"
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;

  template <typename T>
  std::vector<T> values(const std::string& expected_dtype) const {
    if (dtype != expected_dtype) {
      throw std::runtime_error("npy: expected " + expected_dtype + ", got " + dtype);
    }
    std::vector<T> out(bytes.size() / sizeof(T));
    std::memcpy(out.data(), bytes.data(), out.size() * sizeof(T));
    return out;
  }
};

// Raw deflate, RFC 1951.
class Inflater {
 public:
  explicit Inflater(std::span<const uint8_t> in) : in_(in) {}

  std::vector<uint8_t> run() {
    for (bool last = false; !last;) {
      last = bits(1) != 0;
      switch (bits(2)) {
        case 0:
          stored();
          break;
        case 1:
          fixed();
          break;
        case 2:
          dynamic();
          break;
        default:
          throw std::runtime_error("inflate: bad block type");
      }
    }
    return std::move(out_);
  }

 private:
  // Canonical Huffman code: how many codes of each length, and the symbols in order of code.
  struct Code {
    explicit Code(std::span<const uint8_t> lengths) {
      for (const uint8_t length : lengths) ++count[length];
      count[0] = 0;
      std::array<int, 17> start{};
      for (int length = 1; length <= 15; ++length) {
        start[length + 1] = start[length] + count[length];
      }
      symbols.resize(lengths.size());
      for (size_t symbol = 0; symbol < lengths.size(); ++symbol) {
        if (lengths[symbol] != 0) symbols[start[lengths[symbol]]++] = static_cast<int>(symbol);
      }
    }
    std::array<int, 16> count{};
    std::vector<int> symbols;
  };

  uint32_t bits(int n) {
    while (held_ < n) {
      if (next_ == in_.size()) throw std::runtime_error("inflate: input ends early");
      buffer_ |= uint64_t{in_[next_++]} << held_;
      held_ += 8;
    }
    const auto value = static_cast<uint32_t>(buffer_ & ((uint64_t{1} << n) - 1));
    buffer_ >>= n;
    held_ -= n;
    return value;
  }

  int symbol(const Code& code) {
    int value = 0, first = 0, index = 0;
    for (int length = 1; length <= 15; ++length) {
      value |= static_cast<int>(bits(1));
      const int count = code.count[length];
      if (value - first < count) return code.symbols[index + value - first];
      index += count;
      first = (first + count) << 1;
      value <<= 1;
    }
    throw std::runtime_error("inflate: bad code");
  }

  void stored() {
    buffer_ = 0, held_ = 0;
    const uint32_t size = bits(16);
    bits(16);  // its complement
    for (uint32_t i = 0; i < size; ++i) out_.push_back(static_cast<uint8_t>(bits(8)));
  }

  void fixed() {
    std::array<uint8_t, 288> lengths;
    for (int s = 0; s < 288; ++s) lengths[s] = s < 144 ? 8 : s < 256 ? 9 : s < 280 ? 7 : 8;
    const std::array<uint8_t, 30> distances = [] {
      std::array<uint8_t, 30> five;
      five.fill(5);
      return five;
    }();
    codes(Code(lengths), Code(distances));
  }

  void dynamic() {
    constexpr std::array<uint8_t, 19> kOrder = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                                11, 4,  12, 3, 13, 2, 14, 1, 15};
    const uint32_t literals = bits(5) + 257, distances = bits(5) + 1, used = bits(4) + 4;
    std::array<uint8_t, 19> code_lengths{};
    for (uint32_t i = 0; i < used; ++i) code_lengths[kOrder[i]] = static_cast<uint8_t>(bits(3));
    const Code code(code_lengths);
    std::vector<uint8_t> lengths;
    while (lengths.size() < literals + distances) {
      const int s = symbol(code);
      if (s < 16) {
        lengths.push_back(static_cast<uint8_t>(s));
        continue;
      }
      if (s == 16 && lengths.empty()) throw std::runtime_error("inflate: nothing to repeat");
      const uint8_t repeated = s == 16 ? lengths.back() : 0;
      const uint32_t times = s == 16 ? 3 + bits(2) : s == 17 ? 3 + bits(3) : 11 + bits(7);
      lengths.insert(lengths.end(), times, repeated);
    }
    const std::span<const uint8_t> all(lengths);
    codes(Code(all.first(literals)), Code(all.subspan(literals, distances)));
  }

  void codes(const Code& literals, const Code& distances) {
    constexpr std::array<int, 29> kLength = {3,  4,  5,  6,   7,   8,   9,   10,  11, 13,
                                             15, 17, 19, 23,  27,  31,  35,  43,  51, 59,
                                             67, 83, 99, 115, 131, 163, 195, 227, 258};
    constexpr std::array<int, 29> kLengthBits = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                                 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    constexpr std::array<int, 30> kDistance = {
        1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
        193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
    for (;;) {
      const int s = symbol(literals);
      if (s == 256) return;
      if (s < 256) {
        out_.push_back(static_cast<uint8_t>(s));
        continue;
      }
      const size_t length = kLength.at(s - 257) + bits(kLengthBits[s - 257]);
      const int d = symbol(distances);
      const size_t distance = kDistance.at(d) + bits(d < 4 ? 0 : d / 2 - 1);
      if (distance > out_.size()) throw std::runtime_error("inflate: distance too far back");
      for (size_t i = 0; i < length; ++i) out_.push_back(out_[out_.size() - distance]);
    }
  }

  std::span<const uint8_t> in_;
  size_t next_ = 0;
  uint64_t buffer_ = 0;
  int held_ = 0;
  std::vector<uint8_t> out_;
};

template <typename T>
T load_le(std::span<const uint8_t> bytes, size_t at) {
  if (at + sizeof(T) > bytes.size()) throw std::runtime_error("npz: file ends early");
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

inline NpyArray parse_npy(std::span<const uint8_t> bytes) {
  const size_t start = 10;
  const size_t header_size = load_le<uint16_t>(bytes, 8);
  const std::string header(reinterpret_cast<const char*>(bytes.data()) + start, header_size);
  NpyArray array;
  const size_t descr = header.find("'descr': '") + 10;
  array.dtype = header.substr(descr, header.find('\'', descr) - descr);
  if (header.find("'fortran_order': False") == std::string::npos) {
    throw std::runtime_error("npy: expected C order");
  }
  for (size_t at = header.find("'shape': (") + 10; header[at] != ')';) {
    size_t digits = 0;
    array.shape.push_back(std::stoll(header.substr(at), &digits));
    at = header.find_first_not_of(", ", at + digits);
  }
  array.bytes.assign(bytes.begin() + start + header_size, bytes.end());
  return array;
}

// Every array of the file by name.
inline std::map<std::string, NpyArray> read_npz(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("npz: cannot open " + path);
  const std::vector<uint8_t> data((std::istreambuf_iterator<char>(file)), {});
  const std::span<const uint8_t> all(data);
  // The end record (no comment: its last 22 bytes) names the central directory.
  if (data.size() < 22 || load_le<uint32_t>(all, data.size() - 22) != 0x06054b50) {
    throw std::runtime_error("npz: no end record in " + path);
  }
  const int entries = load_le<uint16_t>(all, data.size() - 22 + 10);
  size_t at = load_le<uint32_t>(all, data.size() - 22 + 16);
  std::map<std::string, NpyArray> arrays;
  for (int e = 0; e < entries; ++e) {
    const int method = load_le<uint16_t>(all, at + 10);
    const size_t packed = load_le<uint32_t>(all, at + 20);
    const size_t name_size = load_le<uint16_t>(all, at + 28);
    const size_t local = load_le<uint32_t>(all, at + 42);
    std::string name(reinterpret_cast<const char*>(data.data()) + at + 46, name_size);
    const size_t begin =
        local + 30 + load_le<uint16_t>(all, local + 26) + load_le<uint16_t>(all, local + 28);
    const std::span<const uint8_t> body = all.subspan(begin, packed);
    const std::vector<uint8_t> bytes =
        method == 8 ? Inflater(body).run() : std::vector<uint8_t>(body.begin(), body.end());
    arrays[name.substr(0, name.rfind(".npy"))] = parse_npy(bytes);
    at += 46 + name_size + load_le<uint16_t>(all, at + 30) + load_le<uint16_t>(all, at + 32);
  }
  return arrays;
}

}  // namespace flexprefill::testing

#endif  // FLEXPREFILL_TESTS_NPZ_H_
