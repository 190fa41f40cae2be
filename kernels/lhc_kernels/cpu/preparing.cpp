#include <algorithm>
#include <array>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "operands.h"

namespace lhc {
namespace {

// Beside a layer's weights, what is kept of it is small: 40 bytes for an entry of 2 KiB, say.
constexpr size_t kMostBytes = size_t{64} << 20, kMostLayers = 4096;

// Copies, since the tensors may be written to while a call runs.
struct Tables {
  std::vector<int32_t> tile_ptr, entries, filters;
};

// Whether the tables fit the layer: no index may reach foreign memory, and every filter must be computed once.
bool tables_fit(const Conv& conv, const Tables& tables) {
  const auto& [tile_ptr, entries, filters] = tables;
  const auto entry_count = static_cast<int64_t>(entries.size()) - 1;
  if (tile_ptr.front() != 0 || tile_ptr.back() != entry_count) return false;
  if (!std::is_sorted(tile_ptr.begin(), tile_ptr.end())) return false;
  // Of kernel rows times kernel columns times blocks, all that an entry of 31 bits can reach.
  const int64_t in_blocks = (conv.channels - 1) / conv.in_block + 1;
  const auto taps = static_cast<__int128>(conv.kernel[0]) * conv.kernel[1];
  const auto possible = static_cast<int64_t>(std::min<__int128>(taps * in_blocks, int64_t{1} << 31));
  for (int64_t e = 0; e < entry_count; ++e)
    if (const int32_t entry = entries[static_cast<size_t>(e)]; entry < 0 || entry >= possible) return false;
  if (conv.out_channels > static_cast<int64_t>(filters.size())) return false;
  std::vector<bool> seen(static_cast<size_t>(conv.out_channels), false);
  int64_t found = 0;
  for (const int32_t f : filters) {
    if (f < 0) continue;
    if (f >= conv.out_channels || seen[static_cast<size_t>(f)]) return false;
    seen[static_cast<size_t>(f)] = true;
    ++found;
  }
  return found == conv.out_channels;
}

std::vector<int32_t> copied(const at::Tensor& table) {
  const at::Tensor adjacent = table.contiguous();
  const auto* values = adjacent.const_data_ptr<int32_t>();
  return {values, values + adjacent.numel()};
}

std::shared_ptr<const Prepared> made(const Call& call) {
  const Tables tables{copied(call.tables[0]), copied(call.tables[1]), copied(call.tables[2])};
  if (!tables_fit(call.conv, tables)) return nullptr;
  Conv conv = call.conv;
  conv.tile_ptr = tables.tile_ptr.data(), conv.entries = tables.entries.data(), conv.filters = tables.filters.data();
  return std::make_shared<const Prepared>(conv);
}

// All that a Prepared follows from.
using Key = std::array<int64_t, 32>;

Key key_of(const Call& call) {
  const Conv& c = call.conv;
  const auto address = [](const void* p) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(p)); };
  const auto* t = call.tables;
  const auto identity = [&](size_t i) { return address(t[i].unsafeGetTensorImpl()); };
  const auto place = [&](size_t i) { return address(t[i].const_data_ptr()); };
  const auto version = [&](size_t i) { return static_cast<int64_t>(t[i]._version()); };
  return {identity(0),
          identity(1),
          identity(2),
          place(0),
          place(1),
          place(2),
          version(0),
          version(1),
          version(2),
          t[1].numel(),
          address(c.weight),
          c.unit + 8 * c.pooled,
          c.row_step,
          c.column_step,
          c.batch,
          c.channels,
          c.height,
          c.width,
          c.out_channels,
          c.out_height,
          c.out_width,
          c.kernel[0] << 32 | c.kernel[1],
          c.stride[0] << 32 | c.stride[1],
          c.dilation[0] << 32 | c.dilation[1],
          c.top << 32 | c.left,
          c.tiles,
          c.tile_width,
          c.in_block,
          t[0].stride(0),
          t[1].stride(0),
          t[2].stride(0),
          t[2].stride(1)};
}

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0xcbf29ce484222325;
    for (const int64_t part : key) hash = (hash ^ static_cast<uint64_t>(part)) * 0x100000001b3, hash ^= hash >> 29;
    return hash;
  }
};

// What earlier calls prepared. The tables are held weakly: their memory goes when nobody else wants it, but none of
// their addresses comes back with another tensor.
class Kept {
 public:
  std::shared_ptr<const Prepared> find(const Key& key) const {
    const auto found = layers_.find(key);
    return found == layers_.end() ? nullptr : found->second.prepared;
  }

  void add(const Key& key, const Call& call, std::shared_ptr<const Prepared> prepared) {
    const size_t bytes = prepared->bytes() + sizeof(Layer) + sizeof(Key);
    if (bytes_ + bytes > kMostBytes || layers_.size() >= kMostLayers) layers_.clear(), bytes_ = 0;
    if (bytes > kMostBytes) return;
    const auto weak = [&](size_t i) { return Weak(call.tables[i].getIntrusivePtr()); };
    if (layers_.try_emplace(key, Entry{std::move(prepared), {weak(0), weak(1), weak(2)}}).second) bytes_ += bytes;
  }

 private:
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Entry {
    std::shared_ptr<const Prepared> prepared;
    std::array<Weak, 3> tables;
  };

  std::unordered_map<Key, Entry, Hash> layers_;
  size_t bytes_ = 0;
};

}  // namespace

std::shared_ptr<const Prepared> prepare(const Call& call) {
  // Without a version a write would go unnoticed; a weight made for this call does not come again.
  for (const at::Tensor& table : call.tables)
    if (table.is_inference()) return made(call);
  if (call.own_weight) return made(call);

  // Nobody waits: who finds it locked, by another thread or by one that a fork has left behind, prepares anew.
  static std::mutex mutex;
  static Kept& kept = *new Kept;  // never destroyed, for other threads may still run then
  const Key key = key_of(call);
  if (const std::unique_lock lock(mutex, std::try_to_lock); lock)
    if (auto found = kept.find(key)) return found;
  auto prepared = made(call);
  if (prepared && !prepared->layer.copies_weights())  // which may be written to
    if (const std::unique_lock lock(mutex, std::try_to_lock); lock) kept.add(key, call, prepared);
  return prepared;
}

}  // namespace lhc
