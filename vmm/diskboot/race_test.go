//go:build race

package diskboot_test

const raced = true
