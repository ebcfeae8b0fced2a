// Runs a model that torchrec_mpe.export wrote with form="aoti", in a process without Python.
//
//   serve MODEL.pt2 INPUTS OUTPUTS LIBRARY...
//
// INPUTS is a folder with one file per input of the model, "<name>.bin": the tensor's elements as they lie in memory,
// row by row. Outputs are written to the folder OUTPUTS in the same way, and their shapes printed. Names, dtypes and
// shapes are in the model's metadata. LIBRARY... are the shared libraries with the operators that the model calls:
// torchrec_mpe/ops/libtorchrec_mpe.so for backend="packed"; asmjit.so, fbgemm.so, fbgemm_gpu_config.so and
// fbgemm_gpu_tbe_inference.so of the fbgemm_gpu package for backend="fbgemm".
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Metadata = std::unordered_map<std::string, std::string>;

[[noreturn]] void fail(const std::string& message) {
  throw std::runtime_error(message);
}

at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> dtypes = {
      {"bool", at::kBool},   {"uint8", at::kByte},   {"int8", at::kChar},   {"int16", at::kShort},
      {"int32", at::kInt},   {"int64", at::kLong},   {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
      {"float32", at::kFloat}, {"float64", at::kDouble}};
  const auto found = dtypes.find(name);
  if (found == dtypes.end()) {
    fail("the model has a tensor of unknown dtype " + name);
  }
  return found->second;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    parts.push_back(part);
  }
  return parts;
}

const std::string& entry(const Metadata& metadata, const std::string& key) {
  const auto found = metadata.find(key);
  if (found == metadata.end()) {
    fail("the model has no metadata '" + key + "': was it written by torchrec_mpe.export?");
  }
  return found->second;
}

// A file's pages, shared with every other process that maps it. A page that the model writes to, such as the one with
// the counter of bad ids, becomes the process's own; the file never changes.
class MappedFile {
 public:
  MappedFile(const fs::path& path, std::size_t bytes) : bytes_(bytes) {
    const int file = ::open(path.c_str(), O_RDONLY);
    struct stat status{};
    if (file < 0 || ::fstat(file, &status) != 0 || static_cast<std::size_t>(status.st_size) != bytes) {
      fail("cannot read " + path.string() + " of " + std::to_string(bytes) + " bytes, which the model's weights are in");
    }
    if (bytes > 0) {
      data_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    }
    ::close(file);
    if (data_ == MAP_FAILED) {
      fail("cannot map " + path.string());
    }
  }
  ~MappedFile() {
    if (data_ != nullptr && data_ != MAP_FAILED) {
      ::munmap(data_, bytes_);
    }
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  uint8_t* data() const {
    return static_cast<uint8_t*>(data_);
  }
  std::size_t size() const {
    return bytes_;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

// The weights by name; each line of the metadata is "<offset> <dtype> <dimensions> <name>".
std::unordered_map<std::string, at::Tensor> map_weights(const Metadata& metadata, const MappedFile& file) {
  std::unordered_map<std::string, at::Tensor> weights;
  for (const std::string& line : split(entry(metadata, "weights"), '\n')) {
    std::istringstream stream(line);
    std::size_t offset = 0;
    std::string dtype, dims, name;
    stream >> offset >> dtype >> dims >> name;
    std::vector<int64_t> shape;
    std::size_t bytes = c10::elementSize(dtype_of(dtype));
    for (const std::string& size : split(dims == "-" ? "" : dims, ',')) {
      shape.push_back(std::stoll(size));
      bytes *= shape.back();
    }
    if (offset > file.size() || bytes > file.size() - offset) {
      fail("the weights file is too short for " + name);
    }
    weights[name] = at::from_blob(file.data() + offset, shape, at::TensorOptions().dtype(dtype_of(dtype)));
  }
  return weights;
}

// A tensor from its elements; each line of the metadata is "<name> <dtype> <dimensions>", at most one of which, the
// batch or the number of ids, is no number: the file's size tells it.
at::Tensor read_input(const fs::path& folder, const std::string& line) {
  std::istringstream stream(line);
  std::string name, dtype, dims;
  stream >> name >> dtype >> dims;
  const fs::path path = folder / (name + ".bin");
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    fail("cannot read " + path.string() + ", the input " + line);
  }
  std::vector<int64_t> shape;
  int64_t row_bytes = static_cast<int64_t>(c10::elementSize(dtype_of(dtype)));
  const int64_t bytes = static_cast<int64_t>(fs::file_size(path));
  std::size_t unknown = SIZE_MAX;
  for (const std::string& size : split(dims == "-" ? "" : dims, ',')) {
    if (size.find_first_not_of("0123456789") != std::string::npos) {
      unknown = shape.size();
      shape.push_back(0);
    } else {
      shape.push_back(std::stoll(size));
      row_bytes *= shape.back();
    }
  }
  if (unknown != SIZE_MAX && row_bytes > 0) {
    shape[unknown] = bytes / row_bytes;
  }
  at::Tensor tensor = at::empty(shape, at::TensorOptions().dtype(dtype_of(dtype)));
  if (static_cast<int64_t>(tensor.nbytes()) != bytes) {
    fail(path.string() + " has " + std::to_string(bytes) + " bytes, which is no tensor " + line);
  }
  file.read(static_cast<char*>(tensor.data_ptr()), bytes);
  return tensor;
}

void serve(const std::string& model, const fs::path& inputs, const fs::path& outputs) {
  torch::inductor::AOTIModelPackageLoader loader(model);
  const Metadata metadata = loader.get_metadata();
  const at::Device device(entry(metadata, "device"));

  // Both outlive every run: the model only points to them.
  std::unique_ptr<MappedFile> weights_file;
  std::unordered_map<std::string, at::Tensor> constants;
  if (metadata.count("weights_file") > 0) {
    weights_file = std::make_unique<MappedFile>(fs::path(model).parent_path() / entry(metadata, "weights_file"),
                                                std::stoull(entry(metadata, "weights_bytes")));
    const auto weights = map_weights(metadata, *weights_file);
    for (const std::string& name : loader.get_constant_fqns()) {
      constants[name] = weights.at(name).to(device);  // on the CPU no copy
    }
    loader.load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }

  std::vector<at::Tensor> arguments;
  for (const std::string& line : split(entry(metadata, "inputs"), '\n')) {
    arguments.push_back(read_input(inputs, line).to(device));
  }
  const std::vector<at::Tensor> results = loader.run(arguments);
  const std::vector<std::string> names = split(entry(metadata, "outputs"), '\n');
  fs::create_directories(outputs);
  for (std::size_t k = 0; k < results.size(); ++k) {
    const std::string name = split(names.at(k), ' ').at(0);
    const at::Tensor result = results[k].cpu().contiguous();
    std::ofstream file(outputs / (name + ".bin"), std::ios::binary);
    file.write(static_cast<const char*>(result.const_data_ptr()), static_cast<std::streamsize>(result.nbytes()));
    if (!file.flush()) {
      fail("cannot write to " + outputs.string());
    }
    std::cout << name << ' ' << result.sizes() << '\n';
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: serve MODEL.pt2 INPUTS OUTPUTS LIBRARY...\n";
    return 2;
  }
  for (int k = 4; k < argc; ++k) {
    if (::dlopen(argv[k], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      std::cerr << "error: " << ::dlerror() << '\n';
      return 2;
    }
  }
  try {
    serve(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    // The lines after the first are where in libtorch it was thrown.
    std::cerr << "error: " << split(error.what(), '\n').at(0) << '\n';
    return 1;
  }
  return 0;
}
