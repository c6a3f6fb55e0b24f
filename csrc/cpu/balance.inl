// Body of balance.h. A row bids for the cluster of least cost + price, raising its price by its advantage over the
// second best; a full cluster drops its lowest bidder, who bids again. The price of a full cluster is its lowest bid.

namespace ltk {
namespace LTK_NAMESPACE {

typedef float BidPack __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t IndexPack __attribute__((vector_size(64)));
constexpr int64_t kBidLanes = 16;

// The members of a cluster are a binary heap of rows in job.scratch, lowest bid first, equal bids by lowest row.
static inline bool lower_bid(const float* bid, int64_t a, int64_t b) {
    return bid[a] < bid[b] || (bid[a] == bid[b] && a < b);
}

static inline void heap_push(int64_t* heap, int64_t count, const float* bid, int64_t row) {
    int64_t at = count;
    while (at > 0 && lower_bid(bid, row, heap[(at - 1) / 2])) {
        heap[at] = heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap[at] = row;
}

// Puts `row` in the place of the root.
static inline void heap_replace(int64_t* heap, int64_t count, const float* bid, int64_t row) {
    int64_t at = 0;
    while (2 * at + 1 < count) {
        int64_t child = 2 * at + 1;
        if (child + 1 < count && lower_bid(bid, heap[child + 1], heap[child])) ++child;
        if (!lower_bid(bid, heap[child], row)) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = row;
}

static void balance_f32(const Balance& job) noexcept {
    int64_t* heaps = job.scratch;
    int64_t* queue = heaps + job.rows;
    int64_t* begin = queue + job.rows;
    int64_t* held = begin + job.clusters;
    int64_t position = 0;
    for (int64_t j = 0; j < job.clusters; ++j) {
        begin[j] = position;
        held[j] = 0;
        position += job.capacity[j];
    }
    for (int64_t i = 0; i < job.rows; ++i) queue[i] = i;

    // A ring of waiting rows: as many leave as enter, so it never holds more than `rows`.
    int64_t head = 0, waiting = job.rows;
    while (waiting > 0) {
        const int64_t row = queue[head];
        head = head + 1 == job.rows ? 0 : head + 1;
        --waiting;

        const float* cost = job.cost + row * job.stride;
        BidPack best, second;
        IndexPack best_at, index;
        for (int lane = 0; lane < kBidLanes; ++lane) {
            best[lane] = second[lane] = __builtin_inff();
            index[lane] = lane;
            best_at[lane] = lane;
        }
        for (int64_t j = 0; j < job.stride; j += kBidLanes) {
            const BidPack value =
                *reinterpret_cast<const BidPack*>(cost + j) + *reinterpret_cast<const BidPack*>(job.price + j);
            const IndexPack better = value < best;
            const BidPack runner_up = better ? best : value;
            second = runner_up < second ? runner_up : second;
            best_at = better ? index : best_at;
            best = better ? value : best;
            index += static_cast<int32_t>(kBidLanes);
        }
        float lowest = best[0], next = second[0];
        int32_t at = best_at[0];
        for (int lane = 1; lane < kBidLanes; ++lane) {
            const bool wins = best[lane] < lowest || (best[lane] == lowest && best_at[lane] < at);
            const float loser = wins ? lowest : best[lane];
            if (loser < next) next = loser;
            if (second[lane] < next) next = second[lane];
            if (wins) {
                lowest = best[lane];
                at = best_at[lane];
            }
        }

        // A single cluster has no second best, and no need of one.
        const float raise = next < __builtin_inff() ? next - lowest : 0.0f;
        float bid = job.price[at] + raise + job.epsilon;
        // Far above epsilon the sum may round back to the price, and two rows would then evict each other for ever.
        if (!(bid > job.price[at])) bid = job.price[at] * (1.0f + 2.4e-7f);
        job.bid[row] = bid;
        job.label[row] = at;
        int64_t* heap = heaps + begin[at];
        if (held[at] < job.capacity[at]) {
            heap_push(heap, held[at]++, job.bid, row);
        } else {
            int64_t tail = head + waiting;
            if (tail >= job.rows) tail -= job.rows;
            queue[tail] = heap[0];
            ++waiting;
            heap_replace(heap, held[at], job.bid, row);
        }
        if (held[at] == job.capacity[at]) job.price[at] = job.bid[heap[0]];
    }
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
