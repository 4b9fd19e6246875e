// What a round should have done. Sums are made in float64; all else must be the same bit for bit.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/numeric.h"
#include "world.h"

using namespace hpc_moe::cuda;

namespace {

constexpr int kGroup = 128;  // channels with a scale

struct Row {
    int source, token;
};

class Checker {
   public:
    explicit Checker(World& world) : world_(world), round_(world.round) {
        rows_.resize(round_.local_experts * world.size());
        for (int source = 0; source < world.size(); ++source) {
            if (source == world.dead) continue;
            const Rank& rank = *world.ranks[source];
            for (int i = 0; i < rank.tokens * round_.top_k; ++i) {
                if (is_expert(rank.topk_index[i])) rows_[rank.topk_index[i]].push_back({source, i / round_.top_k});
            }
        }
    }

    std::map<std::string, int64_t> find_wrong() {
        for (int rank = 0; rank < world_.size(); ++rank) {
            if (rank == world_.dead) continue;
            check_records(rank);
            if (round_.is_refused()) {
                const Rank& refused = *world_.ranks[rank];
                const bool knows = refused.arrivals.num_tokens == Arrivals::kCallFailed && refused.recv_count[0] == 0;
                expect(knows || rank == round_.rejecting, "result of a refused call");
            } else if (round_.bad_index != BadIndex::kTwice) {  // which leaves open what comes out
                for (int expert = 0; expert < round_.local_experts; ++expert) check_expert(rank, expert);
                check_combined(rank);
            }
        }
        return std::move(wrong_);
    }

   private:
    void expect(bool is_right, const char* what) {
        if (!is_right) ++wrong_[what];
    }

    bool is_expert(int64_t index) const { return index >= 0 && index < static_cast<int64_t>(rows_.size()); }

    // What the host hears.
    void check_records(int index) {
        Rank& rank = *world_.ranks[index];
        expect(rank.state.masked == (world_.dead >= 0 ? 1u << world_.dead : 0u), "masked ranks");
        expect(rank.host.timeout.sequence == 0, "a wait that took too long");
        ErrorRecord& error = rank.host.error;
        const bool is_bad = round_.bad_index != BadIndex::kNone && index == 0;
        const bool should_hear = is_bad || (round_.is_refused() && index != round_.rejecting);
        expect((error.sequence != error.acknowledged) == should_hear, "error that the host hears of");
        error.acknowledged = error.sequence;
    }

    // A group of channels as e4m3, and its scale.
    void check_cast(const uint16_t* x, const uint8_t* cast, const uint8_t* scale_at) {
        float amax = 1e-4f;
        for (int c = 0; c < kGroup; ++c) amax = std::max(amax, std::fabs(hpc_moe::bf16_to_float(x[c])));
        float scale = amax / hpc_moe::kFp8Max;
        if (round_.round_scale) {
            const uint32_t bits = hpc_moe::float_bits(scale);
            if (bits & 0x7fffffu) scale = hpc_moe::bits_float((bits & 0x7f800000u) + 0x800000u);
        }
        const float factor = round_.round_scale ? 1.0f / scale : hpc_moe::kFp8Max / amax;
        for (int c = 0; c < kGroup; ++c) {
            expect(cast[c] == hpc_moe::float_to_e4m3(hpc_moe::bf16_to_float(x[c]) * factor), "e4m3 of recv_x");
        }
        const uint32_t bits = hpc_moe::float_bits(scale);
        const auto exponent = static_cast<uint8_t>(bits >> 23);
        expect(round_.ue8m0 ? *scale_at == exponent : std::memcmp(scale_at, &bits, sizeof bits) == 0, "scales");
    }

    // The `at`-th row of this rank's `expert`.
    void check_row(const Rank& rank, int expert, int64_t at, const Row& row) {
        const int64_t rows = round_.max_tokens * world_.size(), hidden = round_.hidden;
        const uint16_t* x = &world_.ranks[row.source]->x[row.token * hidden];
        const uint8_t* got = &rank.recv_rows[(expert * rows + at) * hidden * (round_.fp8 ? 1 : 2)];
        expect(rank.recv_src_idx[expert * rows + at] == row.token, "recv_src_idx");
        if (!round_.fp8) {
            expect(std::memcmp(got, x, 2 * hidden) == 0, "rows of recv_x");
            return;
        }
        const auto* scales = reinterpret_cast<const uint8_t*>(rank.recv_scales.data());
        const int in_word = round_.ue8m0 ? 4 : 1;  // scales in a word, of which there is a column for each
        for (int64_t group = 0; group < hidden / kGroup; ++group) {
            const int64_t column = expert * (hidden / kGroup / in_word) + group / in_word;
            check_cast(x + group * kGroup, got + group * kGroup, scales + 4 * (column * rows + at) + group % in_word);
        }
    }

    void check_expert(int index, int expert) {
        const Rank& rank = *world_.ranks[index];
        const std::vector<Row>& rows = rows_[index * round_.local_experts + expert];
        const int most_rows = round_.max_tokens * world_.size();
        expect(rank.recv_count[expert] == static_cast<int>(rows.size()), "recv_count");
        std::vector<int64_t> counts(world_.size(), 0);
        for (size_t at = 0; at < rows.size(); ++at) {
            ++counts[rows[at].source];
            check_row(rank, expert, static_cast<int64_t>(at), rows[at]);
        }
        for (int at = static_cast<int>(rows.size()); at < most_rows; ++at) {
            expect(rank.recv_src_idx[expert * most_rows + at] == kUntouched, "recv_src_idx behind the rows");
        }
        int64_t begin = 0;
        for (int source = 0; source < world_.size(); ++source) {
            const int64_t range = rank.layout_range[expert * world_.size() + source];
            expect(range == (begin << 32 | counts[source]), "layout_range");
            begin += counts[source];
        }
    }

    // A token's rows at its experts, with their weights.
    std::vector<std::pair<const uint16_t*, double>> terms_of(int index, int token) const {
        std::vector<std::pair<const uint16_t*, double>> terms;
        const Rank& rank = *world_.ranks[index];
        for (int k = 0; k < round_.top_k; ++k) {
            const int64_t expert = rank.topk_index[token * round_.top_k + k];
            if (!is_expert(expert) || expert / round_.local_experts == world_.dead) continue;
            const std::vector<Row>& rows = rows_[expert];
            const auto is_it = [&](const Row& row) { return row.source == index && row.token == token; };
            const int64_t at = std::find_if(rows.begin(), rows.end(), is_it) - rows.begin();
            const int64_t row = expert % round_.local_experts * round_.max_tokens * world_.size() + at;
            const uint16_t* x = &world_.ranks[expert / round_.local_experts]->expert_rows[row * round_.hidden];
            terms.emplace_back(x, rank.topk_weights[token * round_.top_k + k]);
        }
        return terms;
    }

    void check_combined(int index) {
        const Rank& rank = *world_.ranks[index];
        for (int token = 0; token < rank.tokens; ++token) {
            const auto terms = terms_of(index, token);
            for (int c = 0; c < round_.hidden; ++c) {
                double sum = 0, magnitude = 0;
                for (const auto& [x, weight] : terms) {
                    const double term = weight * static_cast<double>(hpc_moe::bf16_to_float(x[c]));
                    sum += term;
                    magnitude += std::fabs(term);
                }
                // Rounded to bf16 at the end; sums of ranks on their way, too; the logarithmic format is coarse.
                const double on_the_way = (round_.weighted ? 1.0 / 256 : 0.0) + (round_.logfmt ? 0.03 : 0.0);
                const double bound = std::fabs(sum) / 256 + magnitude * (on_the_way + 1e-6);
                const float got = hpc_moe::bf16_to_float(rank.combined[static_cast<size_t>(token) * round_.hidden + c]);
                expect(std::fabs(sum - got) <= bound, "combined_x");
            }
        }
        for (size_t i = rank.combined.size() - kGuard; i < rank.combined.size(); ++i) {
            expect(rank.combined[i] == kUntouchedBf16, "what lies behind combined_x");
        }
    }

    World& world_;
    const Round& round_;
    std::vector<std::vector<Row>> rows_;  // of each expert, in their order
    std::map<std::string, int64_t> wrong_;
};

}  // namespace

std::map<std::string, int64_t> find_wrong(World& world) { return Checker(world).find_wrong(); }
