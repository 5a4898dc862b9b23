//go:build !race

package find

const raced = false
