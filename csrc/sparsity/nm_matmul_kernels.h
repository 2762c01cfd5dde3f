// The kernels of nm_matmul.cpp, for one instruction set: many columns and few.

#include "sparsity/nm_product_kernels.h"
#include "sparsity/nm_lone_kernels.h"
#include "sparsity/nm_tile_kernels.h"
#include "sparsity/nm_vector_kernels.h"
