// The threads of one parallel region, between whose operations no thread goes to sleep.
//
// An operation written for a team does the calling thread's share and returns; `wait` lets everybody finish. Shares are cut
// so that no result depends on how many threads there are.
#pragma once
#include <atomic>
#include <cstdint>
#include <omp.h>
#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {

// Spins, since an operation of a decode step takes microseconds and a sleeping thread tens of them to wake; yields where the
// wait is long, as on a busy machine.
class Barrier {
public:
    explicit Barrier(int64_t threads) : threads_(threads) {}
    void wait() {
        const int64_t turn = turn_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int64_t spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) {
            if (spins > 4000) sched_yield();
#if defined(__x86_64__)
            else _mm_pause();
#endif
        }
    }

private:
    const int64_t threads_;
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<int64_t> turn_{0};
};

struct Team {
    int64_t me, threads;
    Barrier* barrier;
    void wait() const { barrier->wait(); }
    // This thread's run [first, last) of `total` equal pieces of work.
    void share(int64_t total, int64_t& first, int64_t& last) const { first = total * me / threads, last = total * (me + 1) / threads; }
};

// One parallel region: body(team) in every thread. `most` threads at most where it is positive.
template <typename Body>
void with_team(Body body, int64_t most = 0) {
    const int threads = most > 0 ? int(most < omp_get_max_threads() ? most : omp_get_max_threads()) : omp_get_max_threads();
    if (threads == 1) {
        Barrier alone(1);
        return body(Team{0, 1, &alone});
    }
    Barrier* barrier = nullptr;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        barrier = new Barrier(omp_get_num_threads());  // the region may get fewer threads than were asked for
        body(Team{omp_get_thread_num(), omp_get_num_threads(), barrier});
    }
    delete barrier;
}

}  // namespace tandem
