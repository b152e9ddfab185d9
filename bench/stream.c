/* How fast memory is read: each thread adds up its own part of an array, over and over.
 *
 *     cc -O3 -march=native -ffast-math -pthread stream.c -o stream
 *     ./stream THREADS MEGABYTES TRIES
 *
 * Prints the bytes per second of the best try. After J. D. McCalpin's STREAM, with a kernel that
 * only reads: what decoding does to its weights.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef struct {
  const float *part;
  size_t count;
  volatile float sum;
} Task;

static void *add(void *argument) {
  Task *task = argument;
  float sum = 0.0f;
  for (size_t i = 0; i < task->count; i++) sum += task->part[i];
  task->sum = sum;
  return NULL;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char **argv) {
  if (argc != 4) {
    fprintf(stderr, "usage: stream THREADS MEGABYTES TRIES\n");
    return 2;
  }
  int threads = atoi(argv[1]), tries = atoi(argv[3]);
  size_t count = (size_t)atol(argv[2]) * 1000000 / sizeof(float) / (size_t)threads;
  Task *tasks = malloc((size_t)threads * sizeof(Task));
  pthread_t *workers = malloc((size_t)threads * sizeof(pthread_t));
  for (int t = 0; t < threads; t++) {
    float *part = malloc(count * sizeof(float));
    if (part == NULL) return 1;
    for (size_t i = 0; i < count; i++) part[i] = 1.0f;
    tasks[t] = (Task){part, count, 0.0f};
  }
  double best = 0.0;
  for (int try = 0; try < tries; try++) {
    double start = now();
    for (int t = 0; t < threads; t++) pthread_create(&workers[t], NULL, add, &tasks[t]);
    for (int t = 0; t < threads; t++) pthread_join(workers[t], NULL);
    double rate = (double)(count * (size_t)threads * sizeof(float)) / (now() - start);
    if (rate > best) best = rate;
  }
  printf("%.0f\n", best);
  return 0;
}
