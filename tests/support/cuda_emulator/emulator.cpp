// Every CUDA thread is a fiber; a barrier or a shuffle leaves it for the scheduler, which goes on
// once all threads that have to are there. Threads run in an order that is drawn anew for every
// step: a result that depends on it is a race.
#include "cuda_runtime.h"

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/tokens.h"

namespace emulator {

Index block_index, thread_index;

namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 * 1024;

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
    State state;
    bool begun;
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    // Of the shuffle that it waits at.
    uint32_t mask, bits;
    int distance;
};

std::vector<Fiber> fibers(kMaxThreads);
jmp_buf scheduler;
const std::function<void()>* body;
std::string failure;

void leave(State state) {
    Fiber& fiber = fibers[thread_index.x];
    fiber.state = state;
    if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

void run_every_block() {
    for (;;) {
        (*body)();
        leave(State::kDone);
    }
}

void begin(Fiber& fiber) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, run_every_block, 0);
    setcontext(&context);
}

void resume(unsigned thread) {
    thread_index.x = thread;
    if (_setjmp(scheduler) != 0) return;
    if (fibers[thread].begun) _longjmp(fibers[thread].place, 1);
    begin(fibers[thread]);
}

void on_bad_address(int, siginfo_t* info, void*) {
    failure = "thread " + std::to_string(thread_index.x) + " of block " +
              std::to_string(block_index.x) + " touched memory that is not there";
    (void)info;
    _longjmp(scheduler, 1);
}

// The warps whose lanes are all there exchange their values. Whether any did.
bool exchange(unsigned threads) {
    bool any = false;
    for (unsigned first = 0; first < threads; first += kWarp) {
        const auto lane = [&](unsigned index) -> Fiber& { return fibers[first + index]; };
        unsigned waiting = 0;
        for (unsigned index = 0; index < kWarp; ++index)
            waiting += lane(index).state == State::kAtShuffle;
        if (waiting < kWarp) continue;
        for (unsigned index = 0; index < kWarp; ++index) {
            if (lane(index).mask != 0xffffffffu) failure = "a shuffle leaves lanes out";
            if (lane(index).distance != lane(0).distance)
                failure = "lanes of a warp shuffle over different distances";
        }
        // Ascending: a lane reads one that has not been written yet. Past the last it keeps its own.
        for (unsigned index = 0; index < kWarp; ++index) {
            const unsigned source = index + lane(index).distance;
            if (source < kWarp) lane(index).bits = lane(source).bits;
            lane(index).state = State::kReady;
        }
        any = true;
    }
    return any;
}

void run_block(unsigned threads) {
    static std::mt19937 generator(0);
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    for (unsigned thread = 0; thread < threads; ++thread) fibers[thread].state = State::kReady;
    for (;;) {
        std::shuffle(order.begin(), order.end(), generator);
        for (const unsigned thread : order) {
            if (fibers[thread].state == State::kReady) resume(thread);
            if (!failure.empty()) return;
        }
        if (exchange(threads)) continue;
        unsigned done = 0, at_barrier = 0;
        for (unsigned thread = 0; thread < threads; ++thread) {
            done += fibers[thread].state == State::kDone;
            at_barrier += fibers[thread].state == State::kAtBarrier;
        }
        if (done == threads) return;
        if (at_barrier < threads) {
            failure = std::to_string(done) + " threads have ended, " + std::to_string(at_barrier) +
                      " wait at a barrier and the others at a shuffle";
            return;
        }
        for (unsigned thread = 0; thread < threads; ++thread) fibers[thread].state = State::kReady;
    }
}

// As -ftz=true does. It flushes double numbers too, which a GPU does not: those below 1e-307.
class FlushSubnormals {
  public:
#if defined(__SSE2__)
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#endif
};

class CatchBadAddresses {
  public:
    CatchBadAddresses() {
        struct sigaction action {};
        action.sa_sigaction = on_bad_address;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGSEGV, &action, &before_);
    }
    ~CatchBadAddresses() { sigaction(SIGSEGV, &before_, nullptr); }

  private:
    struct sigaction before_;
};

}  // namespace

void wait_for_block() {
    leave(State::kAtBarrier);
}

uint32_t shuffle_down(uint32_t mask, uint32_t bits, int distance) {
    Fiber& fiber = fibers[thread_index.x];
    fiber.mask = mask;
    fiber.bits = bits;
    fiber.distance = distance;
    leave(State::kAtShuffle);
    return fiber.bits;
}

void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
    if (blocks == 0 || threads == 0 || threads > kMaxThreads || threads % kWarp != 0)
        throw std::runtime_error("invalid configuration");
    body = &kernel;
    failure.clear();
    const FlushSubnormals flush;
    const CatchBadAddresses guard;
    for (block_index.x = 0; block_index.x < blocks && failure.empty(); ++block_index.x)
        run_block(threads);
    if (failure.empty()) return;
    // They stand anywhere.
    for (Fiber& fiber : fibers) fiber.begun = false;
    throw std::runtime_error(failure);
}

}  // namespace emulator

// Of the sanitizer, which calls the first on what it finds.
extern "C" {
void __ubsan_get_current_report_data(const char** kind, const char** message, const char** file,
                                     unsigned* line, unsigned* column, char** address);
__attribute__((visibility("default"))) void __ubsan_on_report() {
    const char *kind, *message, *file;
    unsigned line, column;
    char* address;
    __ubsan_get_current_report_data(&kind, &message, &file, &line, &column, &address);
    emulator::failure = std::string(file) + ":" + std::to_string(line) + ": " + message;
}
}

float __fadd_rn(float x, float y) {
    return x + y;
}

float __fmul_rn(float x, float y) {
    return x * y;
}

// The power of 2 of the rounded product, off by up to two units in the last place, as NVIDIA grants
// it; by the same for the same product.
float __expf(float x) {
    const float product = x * 1.44269504f;
    if (product == 0.0f) return 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &product, sizeof bits);
    bits *= 2654435761u;
    const double error = static_cast<int32_t>(bits ^ bits >> 15) * 0x1p-31 * 0x1p-22;
    return static_cast<float>(exp2(static_cast<double>(product)) * (1.0 + error));
}

cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    return device;
}
const char* cudaGetErrorString(cudaError_t) {
    return "there is one emulated device";
}

// The module binds these too; it has no CPU kernel that could run in place of an emulated one.
namespace qtarget {
namespace {
[[noreturn]] void no_cpu() {
    throw std::logic_error("only the CUDA kernels are emulated");
}
}  // namespace
std::vector<std::string> compiled_isas() {
    return {};
}
std::string cpu_isa() {
    no_cpu();
}
void set_cpu_isa(const std::string&) {
    no_cpu();
}
void cpu_partial_statistics(const StatisticsArgs&, int) {
    no_cpu();
}
void cpu_divergence_sums(const DivergenceArgs&, int) {
    no_cpu();
}
void cpu_logit_gradient(const GradientArgs&, int) {
    no_cpu();
}
void cpu_merge(const MergeArgs&, int) {
    no_cpu();
}
void cpu_weigh(const WeighArgs&, int) {
    no_cpu();
}
void cpu_chain(const ChainArgs&, int) {
    no_cpu();
}
int64_t cpu_supervised(const int64_t*, int64_t, int64_t, int64_t, bool*) {
    no_cpu();
}
}  // namespace qtarget
