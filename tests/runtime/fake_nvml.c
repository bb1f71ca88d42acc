/* A stand-in for libnvidia-ml.so.1 whose answers come from a text file, read again at every call.
 *
 * The environment variable FAKE_NVML_STATE names the file; a line is `key value`. A key may end in `_0`, `_1`, ... for one
 * GPU only. A key that ends in `_error` makes that call return the value as its NVML error code, and `error` makes every
 * call about a GPU do so.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int Result;
typedef void *Gpu;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { unsigned int pid; unsigned long long used; unsigned int instance, compute_instance; } Process;

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
static const long long MIB = 1 << 20;
static const int MIG = 100;

static int find(const char *key, long long *value) {
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char name[64];
    long long number;
    int found = 0;
    while (file && !found && fscanf(file, "%63s %lld", name, &number) == 2)
        if ((found = strcmp(name, key) == 0))
            *value = number;
    if (file)
        fclose(file);
    return found;
}

static int index_of(Gpu gpu) { return (int)(long)gpu - 1; }

static long long get(Gpu gpu, const char *key, long long otherwise) {
    char own[64];
    snprintf(own, sizeof own, "%s_%d", key, index_of(gpu));
    if (!find(own, &otherwise))
        find(key, &otherwise);
    return otherwise;
}

static Result error(Gpu gpu, const char *key) {
    long long gone = get(gpu, "error", SUCCESS);
    return gone ? (Result)gone : (Result)get(gpu, key, SUCCESS);
}

#define FAIL_IF(gpu, key)                    \
    do {                                     \
        Result failed = error(gpu, key);     \
        if (failed)                          \
            return failed;                   \
    } while (0)

Result nvmlInitWithFlags(unsigned int flags) { return (Result)get(NULL, "init_error", SUCCESS); }
Result nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(Result result) { return "an error of the stand-in"; }

Result nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    snprintf(version, length, "580.159.04");
    return SUCCESS;
}

Result nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = 13000;
    return SUCCESS;
}

Result nvmlDeviceGetCount_v2(unsigned int *count) {
    *count = (unsigned int)get(NULL, "gpus", 1);
    return SUCCESS;
}

Result nvmlDeviceGetHandleByIndex_v2(unsigned int index, Gpu *gpu) {
    *gpu = (Gpu)(long)(index + 1);
    return SUCCESS;
}

Result nvmlDeviceGetHandleByUUID(const char *uuid, Gpu *gpu) {
    if (strcmp(uuid, "MIG-7") != 0)
        return NOT_FOUND;
    *gpu = (Gpu)(long)(MIG + 1);
    return SUCCESS;
}

Result nvmlDeviceGetMigMode(Gpu gpu, unsigned int *current, unsigned int *pending) {
    if (index_of(gpu) >= MIG)
        return INVALID_ARGUMENT;
    *current = *pending = (unsigned int)get(gpu, "mig", 0);
    return SUCCESS;
}

Result nvmlDeviceGetMaxMigDeviceCount(Gpu gpu, unsigned int *count) {
    *count = 7;
    return SUCCESS;
}

Result nvmlDeviceGetMigDeviceHandleByIndex(Gpu gpu, unsigned int index, Gpu *instance) {
    if (index != 2)
        return NOT_FOUND;
    *instance = (Gpu)(long)(MIG + 1);
    return SUCCESS;
}

Result nvmlDeviceGetUUID(Gpu gpu, char *uuid, unsigned int length) {
    snprintf(uuid, length, "GPU-%d%d-aaaa", index_of(gpu), index_of(gpu));
    return SUCCESS;
}

Result nvmlDeviceGetName(Gpu gpu, char *name, unsigned int length) {
    snprintf(name, length, index_of(gpu) >= MIG ? "NVIDIA Fake MIG 1g.10gb" : "NVIDIA Fake 80GB");
    return SUCCESS;
}

Result nvmlDeviceGetCudaComputeCapability(Gpu gpu, int *major, int *minor) {
    *major = (int)get(gpu, "capability", 9);
    *minor = 0;
    return SUCCESS;
}

Result nvmlDeviceGetMemoryInfo(Gpu gpu, Memory *memory) {
    FAIL_IF(gpu, "memory_error");
    memory->total = get(gpu, "total_mib", 80000) * MIB;
    memory->used = get(gpu, "used_mib", 1000) * MIB;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

/* `self_mib` is this process; `other_mib` is process `other_pid`, -1 for one whose memory may not be read. */
Result nvmlDeviceGetComputeRunningProcesses_v3(Gpu gpu, unsigned int *count, Process *processes) {
    FAIL_IF(gpu, "processes_error");
    long long self = get(gpu, "self_mib", 0), other = get(gpu, "other_mib", 0);
    unsigned int needed = (self != 0) + (other != 0), room = *count;
    *count = needed;
    if (needed == 0)
        return SUCCESS;
    if (room < needed)
        return INSUFFICIENT_SIZE;
    if (self != 0)
        *processes++ = (Process){(unsigned int)getpid(), self * MIB, 0, 0};
    if (other != 0)
        *processes = (Process){(unsigned int)get(gpu, "other_pid", 1), other < 0 ? ~0ULL : (unsigned long long)(other * MIB), 0, 0};
    return SUCCESS;
}

Result nvmlDeviceGetGraphicsRunningProcesses_v3(Gpu gpu, unsigned int *count, Process *processes) {
    FAIL_IF(gpu, "processes_error");
    *count = 0;
    return SUCCESS;
}

Result nvmlDeviceGetUtilizationRates(Gpu gpu, Utilization *utilization) {
    FAIL_IF(gpu, "utilization_error");
    utilization->gpu = (unsigned int)get(gpu, "utilization", 90);
    return SUCCESS;
}

Result nvmlDeviceGetPowerUsage(Gpu gpu, unsigned int *milliwatts) {
    FAIL_IF(gpu, "power_error");
    *milliwatts = (unsigned int)get(gpu, "milliwatts", 400000);
    return SUCCESS;
}

Result nvmlDeviceGetTotalEnergyConsumption(Gpu gpu, unsigned long long *millijoules) {
    FAIL_IF(gpu, "energy_error");
    *millijoules = (unsigned long long)get(gpu, "millijoules", 1000000);
    return SUCCESS;
}

Result nvmlDeviceGetTemperature(Gpu gpu, unsigned int sensor, unsigned int *celsius) {
    FAIL_IF(gpu, "temperature_error");
    *celsius = (unsigned int)get(gpu, "celsius", 60);
    return SUCCESS;
}

/* Its successor of 2025 is left out, and so is the throttle reasons' older name: drivers have one or the other. */
Result nvmlDeviceGetCurrentClocksEventReasons(Gpu gpu, unsigned long long *reasons) {
    FAIL_IF(gpu, "throttle_error");
    *reasons = (unsigned long long)get(gpu, "throttle", 0);
    return SUCCESS;
}
