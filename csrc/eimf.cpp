#include "eimf.h"

#include "score_kernels.hpp"

extern "C" const char *eimf_version(void) { return EIMF_VERSION; }

extern "C" const char *eimf_status_text(eimf_status status) {
    switch (status) {
        case EIMF_OK: return "success";
        case EIMF_ERROR_ARGUMENT: return "invalid argument";
        case EIMF_ERROR_MEMORY: return "not enough memory";
        case EIMF_ERROR_INTERRUPTED: return "interrupted";
        case EIMF_ERROR_INTERNAL: return "internal error";
    }
    return "unknown status";
}

extern "C" const char *eimf_kernel_name(eimf_kernel kernel) {
    const eimf::ScoreKernels *kernels = eimf::score_kernels(kernel);
    return kernels ? kernels->name : nullptr;
}
