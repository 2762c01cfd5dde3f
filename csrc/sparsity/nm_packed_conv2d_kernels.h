// The kernels of nm_packed_conv2d.cpp, for one instruction set.

#include "sparsity/nm_product_kernels.h"
#include "sparsity/nm_lone_kernels.h"
#include "sparsity/nm_tile_kernels.h"
