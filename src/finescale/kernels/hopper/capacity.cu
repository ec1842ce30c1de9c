// Does nothing: what fills a multiprocessor's shared memory, to ask how many clusters of blocks fit on the GPU at once.
extern "C" __global__ void __launch_bounds__(384, 1) fill_multiprocessor() {}
