// Runs the fuzz target without libFuzzer.
//
//   lookup_fuzz FILE...                         replays inputs
//   lookup_fuzz --seconds N --seed S            runs the random inputs of seed S for N seconds
//               [--corpus FOLDER] [--last FILE] and first the folder's, which random inputs then vary
//
// The input at work is in FILE (lookup_fuzz_input) until the run ends well: what stopped a run can be replayed.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "random_source.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using torchrec_mpe::Random;

using Bytes = std::vector<uint8_t>;

constexpr size_t kInputBytes = 512;

[[noreturn]] void stop(const std::string& message) {
  std::fprintf(stderr, "error: %s\n", message.c_str());
  std::exit(2);
}

Bytes read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    stop("cannot read " + path);
  }
  return Bytes(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

// A file of kInputBytes that is memory of this process: it outlives any crash, at no cost for each input.
class LastInput {
 public:
  explicit LastInput(const std::string& path) : path_(path) {
    const int file = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (file < 0 || ftruncate(file, kInputBytes) != 0) {
      stop("cannot write " + path);
    }
    void* memory = mmap(nullptr, kInputBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) {
      stop("cannot map " + path);
    }
    bytes_ = static_cast<uint8_t*>(memory);
  }

  void run(const Bytes& input) {
    std::memset(bytes_, 0, kInputBytes);
    std::copy_n(input.begin(), std::min(input.size(), kInputBytes), bytes_);
    LLVMFuzzerTestOneInput(bytes_, kInputBytes);
  }

  void remove() {
    munmap(bytes_, kInputBytes);
    unlink(path_.c_str());
  }

 private:
  std::string path_;
  uint8_t* bytes_;
};

Bytes random_input(const std::vector<Bytes>& corpus, Random& random) {
  Bytes input;
  if (!corpus.empty() && random.below(4) == 0) {
    input = corpus[random.below(static_cast<int64_t>(corpus.size()))];
    input.resize(kInputBytes);
    for (int64_t changes = 1 + random.below(8); changes > 0; --changes) {
      input[random.below(kInputBytes)] = static_cast<uint8_t>(random.next());
    }
    return input;
  }
  input.resize(kInputBytes);
  for (uint8_t& byte : input) {
    byte = static_cast<uint8_t>(random.next());
  }
  return input;
}

int replay(const std::vector<std::string>& paths) {
  for (const std::string& path : paths) {
    const Bytes input = read_file(path);
    LLVMFuzzerTestOneInput(input.data(), input.size());
    std::printf("%s: passed\n", path.c_str());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 10.0;
  uint64_t seed = 1;
  std::string folder;
  std::string last_path = "lookup_fuzz_input";
  std::vector<std::string> paths;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("--", 0) != 0) {
      paths.push_back(argument);
      continue;
    }
    if (i + 1 == argc) {
      stop(argument + " needs a value");
    }
    const char* value = argv[++i];
    if (argument == "--seconds") {
      seconds = std::atof(value);
    } else if (argument == "--seed") {
      seed = std::strtoull(value, nullptr, 10);
    } else if (argument == "--corpus") {
      folder = value;
    } else if (argument == "--last") {
      last_path = value;
    } else {
      stop("there is no option " + argument);
    }
  }
  if (!paths.empty()) {
    return replay(paths);
  }
  std::vector<Bytes> corpus;
  if (!folder.empty()) {
    std::vector<std::string> files;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      files.push_back(entry.path());
    }
    std::sort(files.begin(), files.end());
    std::transform(files.begin(), files.end(), std::back_inserter(corpus), read_file);
  }
  std::printf("lookup_fuzz: seed %llu, %g s; replay what stops it with: %s %s\n", static_cast<unsigned long long>(seed),
              seconds, argv[0], last_path.c_str());
  std::fflush(stdout);
  LastInput last(last_path);
  for (const Bytes& input : corpus) {
    last.run(input);
  }
  const auto start = std::chrono::steady_clock::now();
  Random random(seed);
  long inputs = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    last.run(random_input(corpus, random));
    ++inputs;
  }
  last.remove();
  std::printf("lookup_fuzz: %zu inputs of the corpus and %ld random ones passed\n", corpus.size(), inputs);
  return 0;
}
