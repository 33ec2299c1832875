// The data plane's frames (experts/wire/frame.py) sent, awaited and answered without Python: calls of a layer to its
// replicas, and a replica's answers, over sockets whose both ends share the memory of the rows.
//
// Only what is as it should be is dealt with here. Anything else is left on the socket, or handed back with its header:
// Python judges it.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

namespace evermoe {

struct Header {
  char magic[4];
  uint8_t kind, dtype;
  uint16_t layer, segments, unused;
  uint32_t arena;
  uint64_t seq, offset;
  uint32_t rows, width;
  uint64_t aux;
};
struct Segment {
  uint32_t expert, rows;
};
static_assert(sizeof(Header) == 48 && sizeof(Segment) == 8, "frames are laid out as frame.py says");

inline constexpr char kMagic[4] = {'E', 'V', 'M', 'R'};
constexpr uint8_t kCall = 1, kReply = 2;
constexpr size_t kMostSegments = 256;  // of a call that is answered here
constexpr int64_t kSendNs = 5'000'000'000;
constexpr int64_t kLookNs = 50'000'000;  // between two looks whether weights have to be let go
constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kBFloat16, at::kHalf};

inline int64_t now_ns() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Whether `fd` is ready for `events` before `until`.
inline bool ready(int fd, short events, int64_t until) {
  for (;;) {
    const int64_t left = std::max<int64_t>(0, until - now_ns());
    const timespec timeout{left / 1'000'000'000, left % 1'000'000'000};
    pollfd wanted{fd, events, 0};
    const int found = ppoll(&wanted, 1, &timeout, nullptr);
    if (found > 0) return true;
    if (found == 0 || errno != EINTR) return false;
  }
}

// 0, or why not all of `data` could be sent.
inline int send_all(int fd, const char* data, size_t size) {
  const int64_t until = now_ns() + kSendNs;
  while (size > 0) {
    const ssize_t sent = send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0) {
      data += sent;
      size -= sent;
    } else if (errno == EAGAIN) {
      if (!ready(fd, POLLOUT, until)) return ETIMEDOUT;
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

// A frame for each of `fds`: heads are (seq, layer, dtype, arena, offset, rows, width, segments), segments (expert,
// rows), one call's after the other's. All are made before the first is sent: then the replicas want the cores. For
// each 0, or the error number that says why its replica is gone.
inline std::vector<int64_t> send_calls(at::IntArrayRef fds, at::IntArrayRef heads, at::IntArrayRef segments) {
  constexpr size_t kFields = 8;
  TORCH_CHECK(heads.size() == fds.size() * kFields);
  std::vector<std::vector<char>> frames;
  size_t next = 0;
  for (size_t i = 0; i < fds.size(); ++i) {
    const int64_t* h = heads.data() + i * kFields;
    Header head{};
    std::memcpy(head.magic, kMagic, sizeof kMagic);
    head.kind = kCall;
    head.seq = h[0];
    head.layer = h[1];
    head.dtype = h[2];
    head.arena = h[3];
    head.offset = h[4];
    head.rows = h[5];
    head.width = h[6];
    head.segments = h[7];
    TORCH_CHECK(h[7] >= 0 && h[7] <= UINT16_MAX && segments.size() >= 2 * (next + h[7]));
    std::vector<char> frame(sizeof(Header) + h[7] * sizeof(Segment));
    std::memcpy(frame.data(), &head, sizeof head);
    auto* to = reinterpret_cast<Segment*>(frame.data() + sizeof(Header));
    for (size_t end = next + h[7]; next < end; ++next) {
      *to++ = {static_cast<uint32_t>(segments[2 * next]), static_cast<uint32_t>(segments[2 * next + 1])};
    }
    frames.push_back(std::move(frame));
  }
  std::vector<int64_t> failures;
  for (size_t i = 0; i < fds.size(); ++i) failures.push_back(send_all(fds[i], frames[i].data(), frames[i].size()));
  return failures;
}

// 0 once `head` is full, or why it is not.
inline int receive_header(int fd, char* head, int64_t until) {
  size_t got = 0;
  while (got < sizeof(Header)) {
    const ssize_t more = recv(fd, head + got, sizeof(Header) - got, MSG_DONTWAIT);
    if (more > 0) {
      got += more;
    } else if (more == 0) {
      return ECONNRESET;
    } else if (errno == EAGAIN) {
      if (!ready(fd, POLLIN, until)) return ETIMEDOUT;
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

// Waits on each of `fds` for the reply to call `seqs[i]` of `rows[i]` rows until `patience[i]` ns have passed: how many
// ns it took, or a negative error number. EBADMSG: not that reply but something else, of which headers [n, 48] has the
// beginning. The last is waited for first: when it is there the others mostly are too, and the replicas have not been
// interrupted by this thread waking up for each of them. One that is late costs the others nothing: `grace` ns remain.
inline std::vector<int64_t> receive_replies(at::IntArrayRef fds, at::IntArrayRef seqs, at::IntArrayRef rows,
                                            at::IntArrayRef patience, int64_t grace, at::Tensor& headers) {
  const size_t many = fds.size();
  TORCH_CHECK(seqs.size() == many && rows.size() == many && patience.size() == many && headers.is_contiguous());
  TORCH_CHECK(headers.scalar_type() == at::kByte && headers.numel() == static_cast<int64_t>(many * sizeof(Header)));
  auto* heads = reinterpret_cast<char*>(headers.mutable_data_ptr<uint8_t>());
  const int64_t started = now_ns();
  std::vector<int64_t> spent(many);
  for (size_t i = many; i-- > 0;) {
    char* head = heads + i * sizeof(Header);
    const int failure = receive_header(fds[i], head, std::max(started + patience[i], now_ns() + grace));
    Header reply;
    std::memcpy(&reply, head, sizeof reply);
    const bool fits = std::memcmp(reply.magic, kMagic, sizeof kMagic) == 0 && reply.kind == kReply &&
                      reply.dtype < std::size(kDtypes) && reply.segments == 0 &&
                      reply.seq == static_cast<uint64_t>(seqs[i]) && reply.rows == rows[i];
    spent[i] = failure ? -failure : fits ? now_ns() - started : -EBADMSG;
  }
  return spent;
}

// A replica's slices, and the memory of the gateway it answers.
struct Served {
  std::unordered_map<uint64_t, size_t> slices;
  at::TensorList up, down;
  char* memory;
  uint64_t capacity;
  uint32_t arena, width, most_rows;
  at::ScalarType dtype;

  static uint64_t key(uint64_t layer, uint64_t expert) { return layer << 32 | expert; }

  // Whether `head` with its segments is a call of these slices in this memory.
  bool takes(const Header& head, const Segment* segments) const {
    if (std::memcmp(head.magic, kMagic, sizeof kMagic) != 0 || head.kind != kCall || head.arena != arena ||
        head.dtype >= std::size(kDtypes) || kDtypes[head.dtype] != dtype || head.width != width ||
        head.rows == 0 || head.rows > most_rows)
      return false;
    const uint64_t item = c10::elementSize(dtype), size = head.rows * static_cast<uint64_t>(width) * item;
    if (size > capacity || head.offset > capacity - size || head.offset % item != 0) return false;
    uint64_t rows = 0;
    for (size_t i = 0; i < head.segments; ++i) {
      if (!slices.contains(key(head.layer, segments[i].expert))) return false;
      rows += segments[i].rows;
    }
    return rows == head.rows;
  }
};

// Numbers shared with experts/tally.py: a stamp, ns, calls and rows, then (ns, segments, rows) of the latest calls.
struct Tally {
  static constexpr int64_t kHead = 4, kRing = 64, kNumbers = kHead + 3 * kRing;
  int64_t* numbers;
  int64_t stamp;

  bool changed() const { return __atomic_load_n(numbers, __ATOMIC_ACQUIRE) != stamp; }

  void add(int64_t spent, int64_t segments, int64_t rows) const {
    __atomic_fetch_add(numbers + 1, spent, __ATOMIC_RELAXED);
    __atomic_fetch_add(numbers + 3, rows, __ATOMIC_RELAXED);
    const int64_t number = __atomic_fetch_add(numbers + 2, 1, __ATOMIC_RELAXED);
    int64_t* at = numbers + kHead + 3 * (number % kRing);
    at[0] = spent;
    at[1] = segments;
    at[2] = rows;
  }
};

// Answers the calls that come on `fd`, by compute(rows, counts, up, down, out), until one comes that is not for here,
// or the tally's stamp has changed: that one, an end of file or an error is still there for whoever reads next.
template <typename Compute>
void serve_calls(int fd, const Served& served, const Tally& tally, const Compute& compute) {
  struct {
    Header head;
    Segment segments[kMostSegments];
  } frame;
  for (;;) {
    if (!ready(fd, POLLIN, now_ns() + kLookNs)) {
      if (tally.changed()) return;
      continue;
    }
    if (tally.changed()) return;
    const ssize_t got = recv(fd, &frame, sizeof frame, MSG_PEEK);
    if (got < 0 && errno == EINTR) continue;
    if (got < static_cast<ssize_t>(sizeof(Header))) return;
    const size_t size = sizeof(Header) + frame.head.segments * sizeof(Segment);
    if (static_cast<size_t>(got) < size || !served.takes(frame.head, frame.segments)) return;
    if (recv(fd, &frame, size, 0) != static_cast<ssize_t>(size)) return;  // never: they were there
    const int64_t started = now_ns();
    std::vector<int64_t> counts;
    std::vector<at::Tensor> up, down;
    for (size_t i = 0; i < frame.head.segments; ++i) {
      const size_t slice = served.slices.at(Served::key(frame.head.layer, frame.segments[i].expert));
      counts.push_back(frame.segments[i].rows);
      up.push_back(served.up[slice]);
      down.push_back(served.down[slice]);
    }
    const auto options = at::TensorOptions().dtype(served.dtype);
    char* at = served.memory + frame.head.offset;
    const at::Tensor rows = at::from_blob(at, {frame.head.rows, served.width}, options);
    at::Tensor out = at::from_blob(at + served.capacity, {frame.head.rows, served.width}, options);
    compute(rows, counts, up, down, out);
    frame.head.aux = now_ns() - started;
    tally.add(frame.head.aux, frame.head.segments, frame.head.rows);
    frame.head.kind = kReply;
    frame.head.segments = 0;
    if (send_all(fd, reinterpret_cast<const char*>(&frame.head), sizeof(Header))) return;
  }
}

// Copies row t of hidden [T, H], for each of its experts index [T, K], to `out`, laid out part by part: parts are
// (expert, start, rows), where `start` counts the rows sorted by expert. Where the k-th of row t is: [t * K + k].
inline at::Tensor lay_out(const at::Tensor& hidden, const at::Tensor& index, at::IntArrayRef parts, at::Tensor& out) {
  const int64_t pairs = index.numel(), top_k = index.size(1), bytes = hidden.size(1) * hidden.element_size();
  TORCH_CHECK(hidden.is_contiguous() && index.is_contiguous() && out.is_contiguous() && parts.size() % 3 == 0);
  TORCH_CHECK(hidden.size(0) == index.size(0) && out.size(0) == pairs && out.size(1) == hidden.size(1));
  TORCH_CHECK(out.scalar_type() == hidden.scalar_type());
  int64_t experts = 0, laid = 0;
  for (size_t i = 0; i < parts.size(); i += 3) experts = std::max(experts, parts[i] + 1);
  const int64_t* choice = index.const_data_ptr<int64_t>();
  std::vector<int64_t> next(experts + 1, 0), where(pairs, -1);
  for (int64_t i = 0; i < pairs; ++i) {
    TORCH_CHECK_INDEX(choice[i] >= 0 && choice[i] < experts, "no part is of expert ", choice[i]);
    ++next[choice[i] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) next[e + 1] += next[e];
  for (size_t i = 0; i < parts.size(); i += 3) {
    TORCH_CHECK_INDEX(parts[i + 1] >= 0 && parts[i + 2] >= 0 && parts[i + 1] + parts[i + 2] <= pairs,
                      "a part of rows that are not there");
    for (int64_t row = parts[i + 1]; row < parts[i + 1] + parts[i + 2]; ++row) where[row] = laid++;
  }
  TORCH_CHECK(laid == pairs, "the parts do not cover each row once");
  at::Tensor place = at::empty({pairs}, index.options());
  int64_t* at = place.mutable_data_ptr<int64_t>();
  const char* from = static_cast<const char*>(hidden.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < pairs; ++i) {
    at[i] = where[next[choice[i]]++];
    TORCH_CHECK_INDEX(at[i] >= 0, "the parts do not cover each row once");
    std::memcpy(to + at[i] * bytes, from + i / top_k * bytes, bytes);
  }
  return place;
}

}  // namespace evermoe
