/* As much of NVIDIA's management library as telemetry asks for: one GPU with fixed figures.
   NVML_STUB in the environment, read at every call, names the function that is to fail. */
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };

static int fails(const char *name) {
    const char *chosen = getenv("NVML_STUB");
    return chosen && (strcmp(chosen, name) == 0 || strcmp(chosen, "lost") == 0);
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return fails("init") ? DRIVER_NOT_LOADED : SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int status) { (void)status; return "an error"; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    if (strcmp(uuid, "GPU-0123")) return NOT_FOUND;
    *device = (void *)0x1234;
    return SUCCESS;
}

static int check(void *device, const char *name) {
    if (device != (void *)0x1234) abort();
    if (fails("lost")) return GPU_IS_LOST;
    return fails(name) ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
    memory[0] = 80ULL << 30; memory[1] = 77ULL << 30; memory[2] = 3ULL << 30;
    return check(device, "memory");
}

int nvmlDeviceGetUtilizationRates(void *device, unsigned *rates) {
    rates[0] = 93; rates[1] = 41;
    return check(device, "utilisation");
}

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
    *celsius = sensor == 0 ? 57 : 0;
    return check(device, "temperature");
}

int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
    *milliwatts = 312500;
    return check(device, "power");
}
