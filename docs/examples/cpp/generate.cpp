// Greedy decoding of an artifact for ONNX Runtime, through its C API alone.
//
//   generate MODEL.onnx COUNT TOKEN...
//
// prints the COUNT tokens that follow. The cache is one buffer a layer for keys and one for values,
// [1, G, capacity, D] of zeros, bound as past and as present: the model writes new tokens in place.
// The length of attention_mask says how much of it is in use. Text becomes tokens elsewhere:
// tokenizer.json is read by the tokenizers library, which has C++ bindings.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <vector>

namespace {

// The oldest API that has all of this; every later library has it too.
const OrtApi* const ort = OrtGetApiBase()->GetApi(17);

void check(OrtStatus* status) {
  if (status == nullptr) return;
  std::fprintf(stderr, "onnxruntime: %s\n", ort->GetErrorMessage(status));
  std::exit(1);
}

// A name and the shape that the model declares, -1 where it is free.
struct Port {
  std::string name;
  std::vector<int64_t> shape;
};

std::vector<Port> ports(const OrtSession* session, bool outputs) {
  OrtAllocator* allocator;
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  size_t count;
  check(outputs ? ort->SessionGetOutputCount(session, &count)
                : ort->SessionGetInputCount(session, &count));
  std::vector<Port> found(count);
  for (size_t i = 0; i < count; ++i) {
    char* name;
    OrtTypeInfo* type;
    const OrtTensorTypeAndShapeInfo* info;
    size_t rank;
    check(outputs ? ort->SessionGetOutputName(session, i, allocator, &name)
                  : ort->SessionGetInputName(session, i, allocator, &name));
    check(outputs ? ort->SessionGetOutputTypeInfo(session, i, &type)
                  : ort->SessionGetInputTypeInfo(session, i, &type));
    check(ort->CastTypeInfoToTensorInfo(type, &info));
    check(ort->GetDimensionsCount(info, &rank));
    found[i].name = name;
    found[i].shape.resize(rank);
    check(ort->GetDimensions(info, found[i].shape.data(), rank));
    check(ort->AllocatorFree(allocator, name));
    ort->ReleaseTypeInfo(type);
  }
  return found;
}

template <typename T>
OrtValue* tensor(std::vector<T>& data, const std::vector<int64_t>& shape) {
  const bool whole = std::is_same<T, int64_t>::value;
  OrtMemoryInfo* memory;
  OrtValue* value;
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(ort->CreateTensorWithDataAsOrtValue(
      memory, data.data(), data.size() * sizeof(T), shape.data(), shape.size(),
      whole ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &value));
  ort->ReleaseMemoryInfo(memory);
  return value;
}

// One step: the tokens from `past` on go in, the likeliest next one comes out.
int64_t step(OrtSession* session, OrtIoBinding* binding, const std::vector<int64_t>& tokens,
             int64_t past, int64_t vocabulary) {
  const auto total = static_cast<int64_t>(tokens.size());
  std::vector<int64_t> fresh(tokens.begin() + past, tokens.end());
  std::vector<int64_t> mask(total, 1), positions(total - past);
  for (int64_t i = past; i < total; ++i) positions[i - past] = i;
  std::vector<float> logits(vocabulary);
  OrtValue* values[] = {tensor(fresh, {1, total - past}), tensor(mask, {1, total}),
                        tensor(positions, {1, total - past}), tensor(logits, {1, 1, vocabulary})};
  const char* names[] = {"input_ids", "attention_mask", "position_ids"};
  for (int i = 0; i < 3; ++i) check(ort->BindInput(binding, names[i], values[i]));
  check(ort->BindOutput(binding, "logits", values[3]));
  check(ort->RunWithBinding(session, nullptr, binding));
  for (OrtValue* value : values) ort->ReleaseValue(value);  // the binding keeps what it was given
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s MODEL.onnx COUNT TOKEN...\n", argv[0]);
    return 2;
  }
  if (ort == nullptr) {
    std::fprintf(stderr, "onnxruntime is older than 1.17\n");
    return 3;
  }
  const int64_t count = std::atoll(argv[2]);
  std::vector<int64_t> tokens;
  for (int i = 3; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));

  OrtEnv* env;
  OrtSessionOptions* options;
  OrtSession* session;
  OrtIoBinding* binding;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "generate", &env));
  check(ort->CreateSessionOptions(&options));
  check(ort->CreateSession(env, argv[1], options, &session));
  check(ort->CreateIoBinding(session, &binding));

  const int64_t capacity = static_cast<int64_t>(tokens.size()) + count;
  const std::vector<Port> inputs = ports(session, false), outputs = ports(session, true);
  std::vector<std::vector<float>> caches;
  std::vector<OrtValue*> bound;
  caches.reserve(inputs.size());
  for (const Port& past : inputs) {
    const std::string prefix = "past_key_values";
    if (past.name.compare(0, prefix.size(), prefix) != 0) continue;
    const std::string present = "present" + past.name.substr(prefix.size());
    caches.emplace_back(past.shape[1] * capacity * past.shape[3]);
    bound.push_back(tensor(caches.back(), {1, past.shape[1], capacity, past.shape[3]}));
    check(ort->BindInput(binding, past.name.c_str(), bound.back()));
    check(ort->BindOutput(binding, present.c_str(), bound.back()));
  }
  const auto logits = std::find_if(outputs.begin(), outputs.end(),
                                   [](const Port& each) { return each.name == "logits"; });
  for (int64_t made = 0, past = 0; made < count; ++made) {
    const int64_t next = step(session, binding, tokens, past, logits->shape.back());
    past = static_cast<int64_t>(tokens.size());
    tokens.push_back(next);
    std::printf(made ? " %lld" : "%lld", static_cast<long long>(next));
  }
  std::printf("\n");

  for (OrtValue* value : bound) ort->ReleaseValue(value);
  ort->ReleaseIoBinding(binding);
  ort->ReleaseSession(session);
  ort->ReleaseSessionOptions(options);
  ort->ReleaseEnv(env);
}
