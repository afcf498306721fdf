/* Top 3 of 5 items for a user with two interests, one item being excluded. */
#include <eimf.h>
#include <stdio.h>

int main(void) {
    const float interests[1][2][2] = {{{1, 0}, {0, 1}}};
    const float items[5][2] = {{0.9f, 0.1f}, {0.2f, 0.8f}, {0.5f, 0.5f}, {0.1f, 0.7f}, {-1, -1}};
    const int64_t seen_start[2] = {0, 1}, seen[1] = {0};
    int64_t ids[3];
    float scores[3];
    int32_t winner[3];
    eimf_error error;
    eimf_top_n_options options = eimf_top_n_defaults();
    options.exclude_indptr = seen_start;
    options.exclude_indices = seen;

    if (eimf_top_n(&interests[0][0][0], 1, 2, 2, &items[0][0], 5, 3, &options, ids, scores, winner, &error) != EIMF_OK) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    for (int j = 0; j < 3; ++j) printf("item %d, score %.2f, interest %d\n", (int)ids[j], scores[j], (int)winner[j]);
    return 0;
}
