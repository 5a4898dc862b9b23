//go:build !linux || !amd64

package supported

const _ = govmm_supports_only_linux_on_amd64 // so the compiler says it
