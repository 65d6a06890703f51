// In place of the compiler's headers, which libclang comes without.
#pragma once
typedef __SIZE_TYPE__ size_t;
typedef decltype(nullptr) nullptr_t;
