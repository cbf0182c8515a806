// What XLA hands to a function of ours: the C interface of its foreign functions, version 0.5, in
// the parts that are read here. Declared anew, so that building needs no header of XLA's; the
// interface is kept stable for this use, and each struct begins with its size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ffi {

constexpr int kMajor = 0, kMinor = 5, kMetadata = 1, kExecute = 3;
constexpr int kFloat32 = 11, kBFloat16 = 16;

struct Extension {
  size_t struct_size;
  int type;
  Extension* next;
};
struct Version {
  size_t struct_size;
  Extension* extension;
  int major, minor;
};
struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
  int64_t state_type;
};
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};
struct Buffer {
  size_t struct_size;
  Extension* extension;
  int dtype;
  void* data;
  int64_t rank;
  int64_t* dims;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t size() const {
    int64_t size = 1;
    for (int64_t i = 0; i < rank; ++i) size *= dims[i];
    return size;
  }
};
struct Buffers {
  size_t struct_size;
  Extension* extension;
  int64_t size;
  int* types;
  Buffer** buffers;
};
struct Span {
  const char* data;
  size_t size;
};
struct Scalar {
  int dtype;
  void* value;
};
struct Attributes {
  size_t struct_size;
  Extension* extension;
  int64_t size;
  int* types;
  Span** names;
  Scalar** values;
};
struct CallFrame {
  size_t struct_size;
  Extension* extension;
  const void* api;
  void* context;
  int stage;
  Buffers args, rets;
  Attributes attributes;

  // Whether the function is to run; otherwise it was asked what it is, and has been answered for.
  bool runs() {
    if (extension && extension->type == kMetadata) {
      Metadata* metadata = reinterpret_cast<MetadataExtension*>(extension)->metadata;
      metadata->version.major = kMajor, metadata->version.minor = kMinor;
      metadata->traits = 0;
      return false;
    }
    return stage == kExecute;
  }
  template <class T>
  T attribute(const char* name) const {
    for (int64_t i = 0; i < attributes.size; ++i)
      if (attributes.names[i]->size == std::strlen(name) &&
          std::memcmp(attributes.names[i]->data, name, attributes.names[i]->size) == 0)
        return *static_cast<T*>(attributes.values[i]->value);
    return T{};
  }
};

}  // namespace ffi
