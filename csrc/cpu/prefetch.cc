// See prefetch.h.
#include "cpu/prefetch.h"

#include <ctime>

namespace hff {
namespace {

constexpr int kDtypes = 3, kClasses = 2;
PrefetchChoice g_choices[kDtypes * kClasses];

// Trials of a kind go champion, rival, rival, champion on each thread: neighbours make a vote, and
// neither is always first.
struct TrialTurn {
  int step = 0, stage = 0;
  double first = 0.0;  // seconds a byte of the pair's first call

  bool rival() const { return ((step + 1) & 2) != 0; }
};
thread_local TrialTurn t_turns[kDtypes * kClasses];

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

void PrefetchChoice::attempt(bool rivals_turn) {
  const int32_t champion = champion_.load(std::memory_order_relaxed);
  trial_.store(rivals_turn ? rival() : champion, std::memory_order_relaxed);
}

// A lead of six errs once in 50 where one wins two of three pairs; equals end at 64.
void PrefetchChoice::vote(int voted, bool for_rival) {
  constexpr int kLead = 6, kVotes = 64;
  if (voted != stage()) return;
  const int lead = lead_.fetch_add(for_rival ? 1 : -1) + (for_rival ? 1 : -1);
  if (votes_.fetch_add(1) + 1 < kVotes && lead > -kLead && lead < kLead) return;
  const int32_t champion = lead > 0 ? rival() : champion_.load();
  if (!stage_.compare_exchange_strong(voted, voted + 1)) return;
  champion_.store(champion);
  lead_.store(0);
  votes_.store(0);
  if (voted == 1) kept_.store(champion);
}

PrefetchChoice& prefetch_choice_of(int32_t dtype, int64_t rows) {
  return g_choices[dtype * kClasses + (rows == 1 ? 0 : 1)];
}

PrefetchTrial::PrefetchTrial(int32_t dtype, int64_t rows, double bytes)
    : choice_(prefetch_choice_of(dtype, rows)),
      bytes_(bytes),
      open_(choice_.kept() < 0 && rows <= kTriedRows && bytes >= kTrialBytes) {
  if (!open_) return;
  choice_.attempt(t_turns[&choice_ - g_choices].rival());
  begin_ = seconds();
}

PrefetchTrial::~PrefetchTrial() {
  if (!open_) return;
  const double rate = (seconds() - begin_) / bytes_;
  TrialTurn& turn = t_turns[&choice_ - g_choices];
  if ((turn.step & 1) == 0) {
    turn.first = rate;
    turn.stage = choice_.stage();
  } else {
    const double rival = turn.rival() ? rate : turn.first;
    const double champion = turn.rival() ? turn.first : rate;
    const double margin = turn.stage == 0 ? 0.0 : kMarginOfL2;
    choice_.vote(turn.stage, rival < (1.0 - margin) * champion);
  }
  ++turn.step;
}

}  // namespace hff

extern "C" int32_t hff_prefetch(int32_t dtype, int64_t rows) {
  return dtype >= 0 && dtype < hff::kDtypes && rows >= 1 && rows <= hff::kTriedRows
             ? hff::prefetch_choice_of(dtype, rows).kept()
             : -1;
}
